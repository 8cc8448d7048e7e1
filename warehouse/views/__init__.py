"""Views: the stored tables and the canned views, in memory and as the published file."""
