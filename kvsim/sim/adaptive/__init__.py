"""Compression that changes during the run: which level new sequences get, and which are encoded again."""
