"""Capture: forward passes, and the arguments of the experts' calls in them."""
