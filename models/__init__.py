"""Flax transformers of the common families, Hugging Face folders in and out."""
