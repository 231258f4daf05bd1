"""What speaks for the whole fleet: fan-out endpoints and the admin API."""
