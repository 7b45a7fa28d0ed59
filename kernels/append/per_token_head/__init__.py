"""Append new K and V to the paged pool as 8- or 4-bit codes with a scale per token and KV head."""
