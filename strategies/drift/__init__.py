"""Strategies that correct how far clients' models drift apart on non-IID data."""
