"""A small decoder for the Llama family, and the loaders of its files.

`load` turns a name, a file or a directory into a `Model`; `decoder` runs it with whatever
attention it is given; `dense` is that attention without a cache.
"""
