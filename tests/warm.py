"""`python -m MODULE ...` without the seconds of imports: processes forked by one that has imported everything.

A launcher that is started here, and the ranks it starts, are real processes with the parents, sessions, signals and
exit codes that they would have; only `exec` and what follows it up to the last import are left out.
"""

import atexit
import contextlib
import gc
import importlib
import json
import multiprocessing.util
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
IMPORTED = ("torch.distributed.run", "torch._dynamo", "torch.utils.tensorboard", "pretrain.train", "launch.local")
# And what DeepSpeed imports when it is first used.
IMPORTED += ("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.zero.stage3", "tensorboard")
LONGEST_MESSAGE = 1 << 20


class Nursery:
    """Forks warm processes; for as long as it is open."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}"}
        command = [sys.executable, "-c", "import sys, warm; warm.serve(int(sys.argv[1]))", str(theirs.fileno())]
        self._server = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], cwd=TESTS.parent)
        theirs.close()

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], out: int, err: int) -> int:
        """Starts `python -m ARGUMENTS` and returns its process id; it leads a session of its own."""
        request = json.dumps({"arguments": list(arguments), "environment": dict(environment)}).encode()
        socket.send_fds(self._socket, [request], [out, err])
        return json.loads(self._socket.recv(LONGEST_MESSAGE))

    def poll(self, process: int) -> int | None:
        """The exit code of a process that was started here, negative for a signal; None while it lives."""
        self._socket.send(json.dumps({"poll": process}).encode())
        return json.loads(self._socket.recv(LONGEST_MESSAGE))

    def close(self) -> None:
        self._socket.close()
        self._server.wait(timeout=20)


def serve(descriptor: int) -> None:
    """The nursery's own process."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # what is there now, no child has to look through
    requests = socket.socket(fileno=descriptor)
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, LONGEST_MESSAGE, 2)
        if not message:
            return
        request = json.loads(message)
        if (process := request.get("poll")) is not None:
            ended, status = os.waitpid(process, os.WNOHANG)
            requests.send(json.dumps(os.waitstatus_to_exitcode(status) if ended else None).encode())
            continue
        process = os.fork()
        if not process:
            os.setsid()
            _become(
                ["python", "-m", *request["arguments"]], request["environment"], {1: descriptors[0], 2: descriptors[1]}
            )
        for each in descriptors:
            os.close(each)
        requests.send(json.dumps(process).encode())


def _become(command: Sequence[str], environment: Mapping[str, str], descriptors: Mapping[int, int]) -> None:
    """In a process that was just forked: run `python -m ...` as if it had been started so, and end."""
    code = 1
    try:
        for target, source in descriptors.items():
            os.dup2(source, target)
        for number in [int(file.name) for file in Path("/proc/self/fd").iterdir()]:
            if number > 2:
                with contextlib.suppress(OSError):  # that of the listing
                    os.close(number)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        # What others would do at their end is not this process's to do.
        atexit._clear()
        weakref.finalize._registry.clear()  # pyright: ignore[reportAttributeAccessIssue]
        weakref.finalize._registered_with_atexit = False  # pyright: ignore[reportAttributeAccessIssue]
        multiprocessing.util._finalizer_registry.clear()  # pyright: ignore[reportAttributeAccessIssue]
        atexit.register(multiprocessing.util._exit_function)
        os.environ.clear()
        os.environ.update(environment)
        subprocess.Popen._execute_child = _fork_python  # pyright: ignore[reportAttributeAccessIssue]
        os.execv = _exec_python
        code = _run(command)
    finally:
        os._exit(code)


def _run(command: Sequence[str]) -> int:
    """The rest of an interpreter's life, from `-m` to its exit code."""
    module, *arguments = command[command.index("-m") + 1 :]
    sys.argv = [module, *arguments]
    code = 0
    try:
        from faults import injector

        injector.install()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def _exec_python(path: str, arguments: Sequence[str]) -> None:
    os._exit(_run(arguments))


_TELLING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
_really_execute_child: Any = subprocess.Popen._execute_child  # pyright: ignore[reportAttributeAccessIssue]


def _fork_python(self: Any, args: Any, *rest: Any) -> None:
    """`Popen._execute_child`, forking where a rank is to be started."""
    if not isinstance(args, (list, tuple)) or list(args[1:4]) != ["-u", "-m", "pretrain"]:
        _really_execute_child(self, args, *rest)
        return
    environment, out, err, new_session = rest[5], rest[12], rest[14], rest[20]
    sys.stdout.flush()
    sys.stderr.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TELLING)  # one that comes meanwhile is the rank's own to hear
    process = os.fork()
    if process:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while new_session and os.getsid(process) != process:  # Popen returns when the child has got so far
            time.sleep(0.001)
        self.pid, self._child_created = process, True
        return
    if new_session:
        os.setsid()
    for number in _TELLING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    places = {target: source for target, source in ((1, out), (2, err)) if source != -1}
    _become(args, environment if environment is not None else dict(os.environ), places)
