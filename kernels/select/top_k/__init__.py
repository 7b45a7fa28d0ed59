"""Positions of the largest scores of each row, exact and in order of position."""
