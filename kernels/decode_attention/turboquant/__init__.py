"""Paged split-KV decode attention over the TurboQuant presets of vLLM."""
