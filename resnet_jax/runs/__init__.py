"""The run's folder and its process: checkpoints, metrics, signals, progress."""
