"""What the user wrote: a strict schema, loading with line numbers, matching of tensor names."""
