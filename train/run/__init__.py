"""A run's folder: checkpoints, metrics, resuming, stopping in order."""
