"""Strategies that select who trains by what clients answer."""
