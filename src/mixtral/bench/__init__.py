"""Measuring: models of random weights, and speed beside other programs on the same file."""
