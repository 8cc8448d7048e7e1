"""Formats of traces: each file defines `FORMAT`, and its stem, with dashes, is what the command calls it."""
