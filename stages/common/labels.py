"""The one answer that is no label."""

# What a generated answer that matches no label is written as. It is part of the predictions' contract.
INVALID = "<invalid>"
