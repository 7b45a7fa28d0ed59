"""Codings: entropy coders over the codes that an encoding makes. One coder per file."""
