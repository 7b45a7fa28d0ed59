"""H2O: the attention that every token has received so far."""
