"""Predicts how long prefill and decode steps take, and learns from what they took. Pure."""
