"""Strategies that make a model serve the clients that it serves worst."""
