"""From a recipe and headers to a plan, and from a plan to files."""
