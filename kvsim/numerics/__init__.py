"""Formats, transforms, coders and allocators that several methods share. Plain numpy; nothing here knows a strategy."""
