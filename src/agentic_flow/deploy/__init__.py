"""From one typed description to the files that run a stack: spec → checked plan → target → `{path: text}`.

Pure functions: no clock, no network, no randomness. The same input gives the same bytes.
"""
