"""Decode attention where each KV head of a request keeps its own number of tokens, as eviction leaves them."""
