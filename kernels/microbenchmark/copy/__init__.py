"""Copy: the bandwidth of reading and writing as much."""
