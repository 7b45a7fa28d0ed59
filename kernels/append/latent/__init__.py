"""Quantise new latents and write them to their slots: the model's dtype, fp8 e4m3, and ``fp8_ds_mla``."""
