"""Orthogonal and Gaussian transforms of rows: vectors of one token and head."""
