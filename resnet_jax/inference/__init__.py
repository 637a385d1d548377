"""A trained network in use: load, predict, calibrate, export, convert, serve."""
