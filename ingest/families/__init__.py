"""Families: how an MoE layer is found and read; the rule, and the families that differ."""
