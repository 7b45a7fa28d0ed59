"""Rows times a dense square matrix on the matrix units."""
