"""Number formats and transforms that several methods share. Plain numpy; nothing here knows a strategy."""
