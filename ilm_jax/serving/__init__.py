"""A trained run that answers requests."""
