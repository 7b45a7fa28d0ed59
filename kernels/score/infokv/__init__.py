"""InfoKV: how uncertain the model was after a token, weighted by layer, mixed with attention."""
