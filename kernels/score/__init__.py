"""Scores that say which cached tokens (or pages) matter: one folder per method.

`batch` holds the shapes and inputs that methods share, `newest` the attention of the newest queries to all keys,
`pieces` small Triton functions, `reference` the maths that several methods start from.
"""
