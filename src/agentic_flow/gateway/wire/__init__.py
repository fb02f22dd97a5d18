"""Wire formats of model providers as pure functions: bytes in, the vocabulary of `core.messages` out."""
