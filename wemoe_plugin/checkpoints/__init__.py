"""Tensors on disk by name: headers, checkpoints, range reads, and the writer. Only `ranges` knows torch."""
