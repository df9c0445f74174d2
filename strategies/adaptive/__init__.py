"""Strategies whose server takes the mean update as the gradient of an optimiser."""
