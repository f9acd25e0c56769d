"""What every module may use: errors, settings, processes, progress. Nothing here changes what a stage writes."""
