"""From SeqIO tasks to batches that are a function of seed and step."""
