"""Exports: answers as files that other programs read. A file's stem names its format."""
