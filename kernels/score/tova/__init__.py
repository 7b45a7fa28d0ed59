"""TOVA: the attention of the newest query, averaged over all heads of the layer."""
