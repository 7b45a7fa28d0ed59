"""What one GPU can do at all: bandwidth, launch cost, host link, conversion and matrix rates. One folder each."""
