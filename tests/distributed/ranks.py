"""Runs a function on several gloo ranks, in processes that stay alive between tests.

Starting a rank costs seconds of imports, running a tiny step costs milliseconds: so one set of processes serves
all tests of a world size. After a failure the set is killed, and the next test starts a fresh one.
"""

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from pretrain.config import EngineConfig
from pretrain.parallel.mesh import start_mesh


class Ranks:
    """A set of processes that form one process group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> list[Any]:
        """Calls `function(mesh, *arguments)` on every rank; returns what each returned, in the order of ranks."""
        if not all(process.is_alive() for process in self.processes):
            self.stop()
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self.pipes):
            answered = pipe.poll(timeout_s)
            error, result = pipe.recv() if answered else (f"no answer in {timeout_s} s", None)
            if error:
                self.stop()
                raise AssertionError(f"rank {rank} of {self.size}: {error}")
            results.append(result)
        return results

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, port, theirs), daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(ours)


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    mesh = start_mesh(EngineConfig())
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((None, function(mesh, *arguments)))
        except Exception:
            pipe.send((traceback.format_exc(), None))
