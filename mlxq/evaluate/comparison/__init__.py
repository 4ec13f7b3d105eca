"""Two artifacts of one model, compared."""
