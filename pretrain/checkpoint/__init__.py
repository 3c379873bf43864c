"""Checkpoints that belong to no layout: every number under its parameter's name, in global coordinates."""
