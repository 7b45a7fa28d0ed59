"""Decode attention by torch's scaled_dot_product_attention over contiguous bf16 K and V: the outside baseline."""
