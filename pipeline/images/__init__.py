"""Convert image files to arrays: decode them, assign them to splits, find duplicates."""
