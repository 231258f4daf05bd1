"""The way of one request through the router, from its body to the last byte of its answer."""
