"""Checks before GPU time is spent."""

import logging

# On a CPU with AVX512-BF16 bitsandbytes warns at its import that a kernel of the Hub is not installed. No base would
# use it: `stages.common.model.load_base` turns the path off that it belongs to, as it changes the weights' scales.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
