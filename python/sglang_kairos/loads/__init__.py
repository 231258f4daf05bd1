"""Request traces, and the open-loop driver that sends them."""
