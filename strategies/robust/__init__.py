"""Strategies that a few faulty or hostile clients cannot lead astray."""
