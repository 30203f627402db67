"""The loss: forward pass, layer dropout, exit losses and their weights, the training step."""
