"""Kills, damage and hostile input."""
