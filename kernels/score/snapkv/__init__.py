"""SnapKV: what the last queries of the prompt attend to, smoothed over neighbouring tokens."""
