"""The steps of the pipeline: download, normalize, train, evaluate; one module a step."""
