"""Paged split-KV decode attention over KIVI's per-channel keys and per-token values, with a native residual."""
