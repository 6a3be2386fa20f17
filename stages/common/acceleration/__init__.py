"""Ways to the same numbers in less time: rows without padding, a dequantised base, compiled layers, recorded steps."""
