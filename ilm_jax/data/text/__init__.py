"""From entities and templates to tokens."""
