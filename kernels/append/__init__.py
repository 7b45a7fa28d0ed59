"""Quantise new tokens and write them to their slots of the KV pool: one folder per KV format.

`batch` holds the shapes and inputs, and what the write path of every format shares.
"""
