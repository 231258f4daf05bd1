"""Tells which SGLang this is, and whether Kairos knows it. Reads source, imports nothing."""
