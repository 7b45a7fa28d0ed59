"""Host link: pinned copies to the device, to the host, and both at once."""
