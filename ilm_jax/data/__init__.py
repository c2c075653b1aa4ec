"""Data: raw sources, prepared data sets, prompts, feature conversion, exact resume."""
