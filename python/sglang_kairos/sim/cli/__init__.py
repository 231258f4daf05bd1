"""The command lines of the simulator."""
