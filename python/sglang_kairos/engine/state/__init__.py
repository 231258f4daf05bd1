"""The state of one scheduler process: tables, predictors, counters, the decision log."""
