"""Data: record schema, shards, statistics, sources, validation and the clip dataset."""
