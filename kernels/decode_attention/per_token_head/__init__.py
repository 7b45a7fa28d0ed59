"""Paged split-KV decode attention over 8- and 4-bit codes with a scale per token and KV head."""
