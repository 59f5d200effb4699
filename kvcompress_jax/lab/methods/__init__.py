"""Ways to compress a KV cache, ours and others', one per file, all of one interface."""
