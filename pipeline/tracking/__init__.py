"""Record runs in MLflow: metrics, provenance and the model. Nothing here changes what a stage writes."""
