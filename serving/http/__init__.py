"""The HTTP service of `python -m serving.api`."""
