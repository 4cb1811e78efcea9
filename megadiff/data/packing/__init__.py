"""Raw sources to shards, and shards to encoded ones; never imported by reading."""
