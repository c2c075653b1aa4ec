"""Checkpoints: weights from elsewhere into our parameters, and our own states on disk."""
