"""The town desk: text about one invented town, generated from a seed. Standard library only."""
