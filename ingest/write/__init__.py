"""Writing: arrays in, committed Parquet out."""
