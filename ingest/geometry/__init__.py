"""Geometry: what a model's weights alone say about its routers and experts."""
