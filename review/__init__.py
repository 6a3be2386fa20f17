"""Reviewing a change: comparing commits, checking that results belong to them."""
