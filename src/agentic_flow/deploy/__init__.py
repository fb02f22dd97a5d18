"""How the platform ships: from one typed description to the files of a stack, and what runs them.

Spec → checked plan → target → `{path: text}` is pure: no clock, no network, no randomness; the same input
gives the same bytes. Certificates, secrets and the engine are the shell around it.
"""
