"""Paged split-KV decode attention over NVFP4 and MXFP4 keys and values."""
