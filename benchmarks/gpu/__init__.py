"""Check and measure the pipeline on a GPU: `python -m benchmarks.gpu`; see `__main__.py`."""
