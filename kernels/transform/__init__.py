"""Transforms that decorrelate K and V before they are quantised."""
