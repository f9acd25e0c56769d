"""Compare models and recipes on the same images; nothing here changes what a stage writes."""
