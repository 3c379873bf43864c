"""Starting a run: on this machine, or on a cluster. Nothing here imports torch, so a login node answers at once."""
