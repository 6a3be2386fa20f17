"""Checks before GPU time is spent."""
