"""Fold each evicted token into the surviving token whose key is nearest."""
