"""What one scheduler process keeps: tables, predictors, counters, the decision log."""
