"""The nouns: models, devices, engines, workloads and prices as frozen values. No lookups, no files."""
