"""The simulated cluster: clock, requests, servers, router."""
