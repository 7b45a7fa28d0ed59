"""Write path of the TurboQuant paper's Algorithms 1 and 2."""
