"""Quest: an upper bound of the logits of each page, and the bounds of keys that it comes from."""
