"""What kills, damages and deceives."""
