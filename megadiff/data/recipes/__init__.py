"""One file per source: from what its makers publish to tar shards, a manifest and a tokenizer."""
