"""Build networks by name, load and save their weights, and compute their outputs."""
