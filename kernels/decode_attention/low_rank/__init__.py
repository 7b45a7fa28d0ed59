"""Paged split-KV decode attention over low-rank coordinates: K rebuilt tile by tile, the basis of V absorbed (Palu)."""
