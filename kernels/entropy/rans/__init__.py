"""Interleaved range ANS with a fixed budget of words per lane."""
