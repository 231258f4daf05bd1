"""What a request is promised: its targets, how it states them, whether they were met. Pure."""
