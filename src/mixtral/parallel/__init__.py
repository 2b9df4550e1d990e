"""Training on several devices: axes, slices, exchanges between ranks, and pieces of a run state."""
