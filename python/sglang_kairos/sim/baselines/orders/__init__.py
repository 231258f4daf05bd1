"""The orders, one file each: SGLang v0.5.23's, and EDF. See `order` for what one is."""
