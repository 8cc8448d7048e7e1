"""Trace formats: each file defines `FORMAT`, and its stem, with dashes, is the format's name in the command."""
