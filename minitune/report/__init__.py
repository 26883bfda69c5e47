"""Reports: observers of a run that show progress, write metrics.jsonl and plot the loss; tables for a terminal."""
