"""Sweeps over exits and speculation: accuracy against depth and speed."""
