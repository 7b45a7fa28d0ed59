"""What runs over every kernel: checking against references, compiling without a GPU, counting instructions."""
