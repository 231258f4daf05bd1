"""What no scheduler could beat: an upper bound of TTFT attainment."""
