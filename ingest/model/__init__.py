"""Models: finding one, loading it, and locating its MoE layers."""
