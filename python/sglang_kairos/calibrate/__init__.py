"""Measures how long steps take on a server or a GPU, and fits a latency model."""
