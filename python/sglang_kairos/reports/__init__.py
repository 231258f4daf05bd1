"""Turns runs, ours and those of other load generators, into tables, JSON and pictures."""
