"""KeyDiff: keys that point away from the mean key matter most."""
