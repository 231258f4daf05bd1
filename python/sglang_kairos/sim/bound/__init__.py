"""An upper bound on the TTFT attainment of any scheduler."""
