"""Training: losses and steps on the stacked form of the models."""
