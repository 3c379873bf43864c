"""What a model is made of and what a run of it costs, as arithmetic on the config: no weights, no torch."""
