"""Quantise and append NVFP4 and MXFP4 keys and values."""
