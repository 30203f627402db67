"""Choosing how to leave early from prompts: thresholds with a guarantee, and what is fastest."""
