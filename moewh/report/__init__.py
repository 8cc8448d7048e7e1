"""`moewh report`: every figure of `moewh.plots` for the runs of a warehouse, in one self-contained page."""
