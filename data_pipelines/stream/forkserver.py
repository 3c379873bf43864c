"""Imported by the process that data workers are forked from, and by no other.

It loads once what every worker needs, and outlives Slurm's SIGTERM: workers end when it does.
"""

import signal

import data_pipelines.stream.heldout
import data_pipelines.stream.loader  # noqa: F401

signal.signal(signal.SIGTERM, signal.SIG_IGN)
