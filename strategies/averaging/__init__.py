"""Strategies that average models, or the gradients of one step."""
