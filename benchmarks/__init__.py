"""Benchmarks: scripts that print both sides of a ratio from one run. They are not tests."""
