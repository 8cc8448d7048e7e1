"""Files: what is stored, where, and how it is committed."""
