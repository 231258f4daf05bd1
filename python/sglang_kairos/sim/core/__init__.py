"""The simulated cluster: clock, requests, servers and router."""
