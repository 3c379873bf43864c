"""Starting a run: on this machine, or on a cluster. It imports no torch (but for `launch.torchrun`,
which runs by itself), so a login node answers at once."""
