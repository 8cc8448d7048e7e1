"""Files, views, answers and trust."""
