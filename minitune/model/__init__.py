"""The transformer: the network, its projections with adapters, its two hand-written halves, generation."""
