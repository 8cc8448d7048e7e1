"""Prompts: from files as people have them to tokens in batches."""
