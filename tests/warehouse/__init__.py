"""Files, views, queries and trust."""
