"""Tools around a running cluster: traces, an open-loop driver, reports."""
