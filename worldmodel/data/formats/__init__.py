"""Readers and writers of foreign dataset formats; `base` says what a reader is, `mapping` how names are matched."""
