"""Tiers below the device's KV pool: what lies where, copies between them, and when to load or compute again."""
