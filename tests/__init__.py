"""Tests mirror `stages/`; they run without network or GPU."""
