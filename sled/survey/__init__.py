"""What every layer of a model says on its own answers, and what leaving early there would give on this machine."""
