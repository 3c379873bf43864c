"""What tars hold: samples, their faults, and the manifest that lists them once."""
