"""Readers and writers of other people's dataset formats; `base` says what a reader is, `mapping` how names are matched."""
