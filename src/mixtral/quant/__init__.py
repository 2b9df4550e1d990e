"""Number formats of weights: what their blocks hold, and how they turn into numbers and back."""
