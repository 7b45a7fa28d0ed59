"""Replace the tokens of a head by few weighted atoms: balanced clustering and means."""
