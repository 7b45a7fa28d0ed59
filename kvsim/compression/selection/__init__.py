"""Token selections: which tokens are kept and read. One method per file."""
