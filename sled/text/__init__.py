"""Text and token ids: prompts in, texts out, stop strings."""
