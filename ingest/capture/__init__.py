"""Capture: forward passes and what the experts were called with in them."""
