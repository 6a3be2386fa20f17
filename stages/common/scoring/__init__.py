"""Labels out of a language model: scored, or generated and matched."""
