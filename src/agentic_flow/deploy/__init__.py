"""How the platform ships: stacks from a typed spec, their certificates, and what runs them."""
