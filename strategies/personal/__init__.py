"""Strategies that leave each client a part of the model of its own."""

from .personal import Personal, own_model, update_with_private

__all__ = ["Personal", "own_model", "update_with_private"]  # where they were in release 0.1
