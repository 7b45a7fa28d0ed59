"""Matrix products of a model's linear layers, by torch (cuBLAS or hipBLASLt): bf16 and fp8."""
