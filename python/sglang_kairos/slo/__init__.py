"""What a request is promised: targets, how they are said, whether they were kept. Pure."""
