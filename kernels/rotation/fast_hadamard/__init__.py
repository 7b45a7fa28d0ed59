"""Walsh-Hadamard transform of rows by butterflies in registers, with optional random signs."""
