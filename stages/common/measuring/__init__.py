"""Numbers, curves and tables out of predictions."""
