"""What `python -m serving.app` shows."""
