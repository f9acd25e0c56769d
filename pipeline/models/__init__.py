"""Networks by name, their weights and files, and inference."""
