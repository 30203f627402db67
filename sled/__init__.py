"""Layers speak."""
