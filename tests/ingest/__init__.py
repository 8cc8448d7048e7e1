"""From prompts and a model to committed segments."""
