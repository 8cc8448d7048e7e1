"""Proof: rebuild each layer's output from what was captured, and measure the layer in doing so."""
