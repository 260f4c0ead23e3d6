"""The quickstart: a recipe, tiny checkpoints, and a generator of images."""
