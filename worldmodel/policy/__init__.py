"""Stage 3: action prediction."""
