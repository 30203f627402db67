"""The families of models: one file each, which maps a Hugging Face configuration to ours and back."""
