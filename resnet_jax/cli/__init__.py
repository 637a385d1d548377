"""The command line: one command, with a tool for each task."""
