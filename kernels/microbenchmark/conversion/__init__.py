"""Conversion rate: how many numbers per clock change dtype, held in registers."""
