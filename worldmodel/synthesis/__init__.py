"""Stage 2: synthesis of every future stream."""
