"""Launch cost: kernels that do nothing, launched one by one and as nodes of a CUDA graph."""
