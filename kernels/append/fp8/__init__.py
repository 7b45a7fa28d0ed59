"""Append new K and V to the paged pool as 8-bit floating point with one scale per tensor."""
