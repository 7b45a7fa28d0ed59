"""Paged split-KV decode attention over q8_0, q5_1 and q4_0 blocks of ggml."""
