"""Data set families: TFDS builders, SeqIO tasks and mixtures. Copy a file to add a domain."""
