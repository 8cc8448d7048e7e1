"""The `moewh` command: one file per command."""
