"""Reads and makes request traces, and sends them with an open-loop driver."""
