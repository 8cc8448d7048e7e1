"""Traces: routing that another program recorded, as files in, as a run out. `formats/` has one file per format."""
