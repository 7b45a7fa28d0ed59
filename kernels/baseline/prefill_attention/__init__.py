"""Causal attention over whole prompts (FlashAttention-style)."""
