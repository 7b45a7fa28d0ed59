"""Write path of the TurboQuant presets of vLLM."""
