"""Files: what is stored, where it lies, and how it is committed."""
