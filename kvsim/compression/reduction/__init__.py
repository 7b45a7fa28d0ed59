"""Reductions: fewer channels, a smaller basis or fewer layers per kept token. One method per file."""
