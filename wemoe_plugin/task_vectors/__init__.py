"""Task vectors in compressed forms."""
