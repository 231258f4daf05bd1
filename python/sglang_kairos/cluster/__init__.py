"""A prefill/decode cluster on one machine: its processes, ports and command lines."""
