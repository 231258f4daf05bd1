"""How long steps take in the simulated cluster, and how big its servers are."""
