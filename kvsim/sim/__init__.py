"""The clock: continuous batching played by SimPy. The only place that imports it."""
