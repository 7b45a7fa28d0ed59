"""Append K and V to KIVI's native residual, and quantise the groups that leave it."""
