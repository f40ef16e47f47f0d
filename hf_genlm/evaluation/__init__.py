"""Numbers about a model, each with its unit, count and standard error."""
