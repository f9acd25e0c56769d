"""Export a trained model: a file for other runtimes, verified against the original, and what is needed to serve it."""
