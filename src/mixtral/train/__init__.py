"""Training: configuration, data, losses, optimizers, run states, and the pretraining recipe."""
