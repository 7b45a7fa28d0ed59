"""Algorithms that several compression methods need: one subject per file, plain numpy."""
