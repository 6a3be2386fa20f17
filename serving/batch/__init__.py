"""What `python -m serving.predict` reads and writes."""
