"""Prompts: from files in common formats to tokens in batches."""
