"""The trace formats, one file each. `loads.format` defines what a format is."""
