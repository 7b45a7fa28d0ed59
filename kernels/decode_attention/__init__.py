"""Attention of one new token per request over a paged KV cache, split over the context: one folder per KV format.

`batch` holds the shapes and inputs, `reference` the maths, `softmax` and `combine` the Triton that all formats share.
"""
