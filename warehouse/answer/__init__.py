"""Answers: a query in, rows out, on DuckDB in a jail or on Spark."""
