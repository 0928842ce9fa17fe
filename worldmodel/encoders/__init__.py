"""Stage 1: understanding and fusion."""
