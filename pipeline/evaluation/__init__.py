"""Compute and plot the metrics of a model."""
