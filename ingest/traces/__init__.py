"""Traces: files of routing that another program recorded in, a run out. `formats/` has one file per format."""
