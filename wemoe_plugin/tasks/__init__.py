"""Data to tune and score on, and the heads that turn features into predictions."""
