"""The steps of `review.verify`."""
