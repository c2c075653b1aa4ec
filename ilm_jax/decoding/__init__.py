"""Decoding inside jit: sampling, constrained search."""
