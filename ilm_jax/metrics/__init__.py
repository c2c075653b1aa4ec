"""Metrics: ranking, intervals."""
