"""Scores of a model, local or remote. Works on answers as text and calls; no torch."""
