"""Runs read back from their folders, compared and drawn."""
