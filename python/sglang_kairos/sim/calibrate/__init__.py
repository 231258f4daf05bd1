"""From what a real cluster did to a simulated one."""
