"""The blocks of params.yaml as typed values: every key, its unit and its allowed range."""
