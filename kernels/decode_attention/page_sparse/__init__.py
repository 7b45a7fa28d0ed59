"""Decode attention over the pages that each KV head selected (Quest)."""
