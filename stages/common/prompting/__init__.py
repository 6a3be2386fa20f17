"""From a text to the tokens of a prompt."""
