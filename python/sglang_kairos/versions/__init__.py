"""Fetches, checks, patches and adds SGLang versions."""
