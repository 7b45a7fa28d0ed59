"""RMSNorm of rows."""
