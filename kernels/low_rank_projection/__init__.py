"""Project K and V of a group of heads to coordinates in a smaller basis, and expand coordinates to a head's values."""
