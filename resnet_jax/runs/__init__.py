"""The run's folder and its process: files, checkpoints, signals, progress."""
