"""Read-only stream: the bandwidth that a kernel can reach which reads everything once and writes almost nothing."""
