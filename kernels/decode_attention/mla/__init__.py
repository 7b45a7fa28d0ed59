"""Paged split-KV decode attention over one latent per token shared by all query heads (MLA)."""
