"""Use a trained network: load, predict, calibrate, export, convert, serve."""
