"""Models: where one comes from, how it is loaded, and where its MoE layers are."""
