"""Rotary position embedding of query and key rows."""
