"""Families: how MoE layers are found and read, by one rule and adapters for the families that differ."""
