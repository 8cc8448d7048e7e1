"""Sealing: the counts of a complete run, merged over its segments."""
