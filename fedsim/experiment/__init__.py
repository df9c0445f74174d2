"""An experiment: its config, its objects, its run, and what the run leaves behind."""
