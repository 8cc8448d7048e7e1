"""Helpers that tests of several rooms share: tiny models, synthetic warehouses, damage."""
