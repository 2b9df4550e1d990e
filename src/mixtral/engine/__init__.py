"""Continuous batching over token ids: the scheduler plans a step, the runner computes it, samplers choose tokens."""
