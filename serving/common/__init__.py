"""What every way of serving shares."""
