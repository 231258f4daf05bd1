"""Fits a simulated cluster to what a real one did."""
