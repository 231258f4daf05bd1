"""Runs a prefill/decode cluster on one machine: what to start (`layout`), starting and ending (`run`)."""
