"""A run's batches from any step on, and the held-out split."""
