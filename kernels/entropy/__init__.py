"""Entropy coding of codes: for cold blocks and transfers, not inside attention."""
