"""Metrics of a model and their plots."""
