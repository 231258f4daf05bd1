"""The trace formats, one file each. See `loads.format` for what one is."""
