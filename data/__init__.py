"""Data: text to token shards, and shards to exactly resumable packed batches."""
