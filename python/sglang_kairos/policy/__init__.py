"""Pure decisions: arrays in, indices out. No clock, no I/O, no torch, no SGLang."""
