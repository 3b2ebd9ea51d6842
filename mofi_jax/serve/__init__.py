"""A page in the browser for a model, on one's own machine: `mofi serve`."""
