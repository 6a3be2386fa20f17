"""Code that more than one stage uses, a module for each thing it holds."""
