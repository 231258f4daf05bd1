"""Scheduling policies as pure functions: arrays in, indices out. No clock, I/O, torch or SGLang."""
