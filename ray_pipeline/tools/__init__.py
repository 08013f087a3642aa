"""Functions that a model may call while it answers: their format, what they are, and running them."""
