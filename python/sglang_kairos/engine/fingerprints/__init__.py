"""Which SGLang is this, and is it one that Kairos knows? Reads source, imports nothing."""
