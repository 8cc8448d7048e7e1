"""Proof: a layer's output rebuilt from what was captured, and what that shows of the layer."""
