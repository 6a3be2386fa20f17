"""What `python -m serving.merge` and `python -m serving.gguf` make of an adapter, and how it is compared with it."""
