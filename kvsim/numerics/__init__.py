"""Number formats, transforms, coders and allocators that several methods share. Plain numpy; nothing knows a strategy."""
