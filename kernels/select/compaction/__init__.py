"""Move kept tokens from old pages into new, dense ones."""
