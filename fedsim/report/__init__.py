"""What finished runs say: read back, set side by side, drawn."""
