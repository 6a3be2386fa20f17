"""Measurements that are run on demand, outside the pipeline; each prints a table for docs/."""
