"""Measurements that are run on demand, outside the pipeline; each prints a table for docs/."""

OURS = "this project"  # as the benchmarks of speed name it, beside what users would run instead


def rate_text(rate: float) -> str:
    """Examples a second to three digits, or all before the point."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
