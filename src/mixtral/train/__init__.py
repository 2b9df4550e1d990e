"""Training: one loop, and the recipes pretraining, SFT and DPO; data, losses, optimizers, run states, records."""
