"""Sealing: merging the counts of a complete run over its segments."""
