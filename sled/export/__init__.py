"""Models in forms that run elsewhere: a Hugging Face folder with a model card, an Orbax folder, a portable program."""
