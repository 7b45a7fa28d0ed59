"""Paged split-KV decode attention over 8-bit floating-point K and V with one scale per tensor."""
