"""Pages outside memory: `page_file` (one page as a file), `disk_tier` (many of them, below host
memory), `scrub` (is everything right?).

Needs the extra `storage` (xxhash, zstandard), and therefore imports nothing by itself. Nothing here
touches a device.
"""
