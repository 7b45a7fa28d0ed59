"""Paged split-KV decode attention over a native (bf16, fp16) KV cache."""
