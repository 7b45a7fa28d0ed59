"""KV encodings: how a kept token is stored. One format per file."""
