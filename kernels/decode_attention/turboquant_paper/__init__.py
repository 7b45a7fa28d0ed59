"""Paged split-KV decode attention over the TurboQuant paper's Algorithms 1 and 2."""
