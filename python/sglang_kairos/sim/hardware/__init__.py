"""Step times and sizes of the simulated servers."""
