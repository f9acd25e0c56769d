"""MLflow: runs, metrics, the store, provenance and the recorded model. Nothing here changes what a stage writes."""
