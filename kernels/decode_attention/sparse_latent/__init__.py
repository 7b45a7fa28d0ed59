"""Decode attention over the top-k tokens of each request in a paged latent cache (DeepSeek sparse attention)."""
