"""Which tokens of a cache stay: eviction policies, one per file, all of one interface."""
