"""Benchmarks of speed, and the PyTorch code to compare with."""
