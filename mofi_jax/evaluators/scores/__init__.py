"""Metrics as the literature defines them: from ranks, and how sure a mean is.  NumPy alone."""
