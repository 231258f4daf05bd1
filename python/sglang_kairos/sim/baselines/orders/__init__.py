"""The orders, one file each: SGLang v0.5.23's, and EDF. `order` defines what an order is."""
