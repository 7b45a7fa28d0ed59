"""Knorm: keys with small norms matter most."""
