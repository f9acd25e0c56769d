"""Code that every module may use, such as errors, settings and progress. It does not change what a stage writes."""
