"""Append new K and V to the paged pool as they are: the baseline of the write path."""
