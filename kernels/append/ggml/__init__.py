"""Quantise new K and V to ggml blocks of q8_0, q5_1 or q4_0."""
