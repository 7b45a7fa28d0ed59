"""What every engine runs beside the KV cache: attention over a prompt, norms, rotary embedding, matrix products."""
