"""Views: the stored tables and the canned views, in memory and in `warehouse.duckdb`."""
