"""From image files to arrays: decode, split, find duplicates."""
