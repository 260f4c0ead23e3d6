"""Scores as plain values, and pages and pictures of them."""
