"""The data sources: how each is fetched, and how its files are read."""
