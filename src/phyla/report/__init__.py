"""A page a person can act on, and its figures."""
