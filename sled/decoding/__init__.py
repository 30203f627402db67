"""Decoding: one jitted loop, driven through a small protocol that any model can serve."""
