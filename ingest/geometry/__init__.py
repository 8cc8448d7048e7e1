"""Geometry: measures of a model's routers and experts from its weights alone."""
