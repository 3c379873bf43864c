"""A Slurm cluster of Debian's own packages on this machine: munged, slurmctld, and a slurmd per node.

Every node is a UTS, mount and PID namespace of its own, so that it has its own name, and dies with all its processes
by one SIGKILL. It needs root and the packages; `missing()` says what is not there.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")

NODE = """
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/etc" /etc/slurm
slurmd -D -N "$1" &
wait
"""

# Times are short, so that a test need not wait: a silent node is down after 10 s, a requeued job may start after 5 s,
# the scheduler looks every second, and a job that was told to stop has `grace_s`.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/spool/%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/%n
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s} State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "a Slurm cluster needs root"
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"{', '.join(absent)} is not here: apt-get install {' '.join(PACKAGES)}"
    if subprocess.run(["unshare", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "this machine lets nobody make namespaces"
    return None


class Cluster:
    """Nodes n1, n2, ...; partitions low, whose jobs can be preempted, and high."""

    def __init__(self, folder: Path, nodes: int = 2, grace_s: int = 30) -> None:
        assert len(str(folder)) < 70, "the path of a socket has at most 107 bytes"
        self.folder = folder
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("etc", "munge", "state", "spool", "log"):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        ports = _free_ports(nodes + 1)
        lines = [
            f"NodeName={name} NodeAddr=127.0.1.{number} NodeHostname={name} Port={port} CPUs=8 RealMemory=8000"
            for number, (name, port) in enumerate(zip(self.names, ports[1:], strict=True), 1)
        ]
        conf = CONF.format(
            host=socket.gethostname(), port=ports[0], folder=folder, nodes="\n".join(lines), grace_s=grace_s
        )
        (folder / "etc/slurm.conf").write_text(conf)
        hosts = [f"127.0.1.{number} {name}" for number, name in enumerate(self.names, 1)]
        hosts += ["127.0.0.1 localhost", f"127.0.0.1 {socket.gethostname()}"]
        (folder / "hosts").write_text("\n".join(hosts) + "\n")
        key = folder / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "etc/slurm.conf")}

    def start(self) -> None:
        """Starts whatever does not run, and waits for all nodes."""
        munge = self.folder / "munge"
        places = [f"--{name}={munge / name}" for name in ("socket", "pid-file", "seed-file", "log-file")]
        self._spawn("munged", "munged", "--foreground", f"--key-file={munge / 'key'}", *places)
        wait_for(lambda: (munge / "socket").exists())
        self._spawn("slurmctld", "slurmctld", "-D")
        for name in self.names:
            namespaces = ("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
            self._spawn(name, *namespaces, "bash", "-c", NODE, "node", name, str(self.folder))
        wait_for(lambda: self.nodes_up() == len(self.names), what="nodes")

    def stop(self) -> None:
        for name in reversed(list(self.processes)):
            self.kill(name)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Sends a signal to a daemon's or a node's group; SIGKILL of a node takes all its processes, as a power cut."""
        with suppress(ProcessLookupError):
            os.killpg(self.processes[name].pid, number)
        if number == signal.SIGKILL:
            self.processes.pop(name).wait()

    def freeze(self, name: str, number: int = signal.SIGSTOP) -> None:
        """Stops slurmd on a node, or lets it go on with SIGCONT: the ranks run, and the controller hears nothing."""
        for child in _descendants(self.processes[name].pid):
            if Path(f"/proc/{child}/comm").read_text().strip() == "slurmd":
                os.kill(child, number)

    def _spawn(self, name: str, *words: str) -> None:
        if name in self.processes:
            return
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def run(self, *words: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a command as a user of the cluster would."""
        options = {"env": self.environment, "timeout": 120, **options}
        return subprocess.run(words, capture_output=True, text=True, check=check, **options)

    def nodes_up(self) -> int:
        up = self.run("sinfo", "-h", "-N", "-p", "low", "-t", "idle,mixed,allocated", "-o", "%N", check=False)
        return len(set(up.stdout.split()))

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job: JobState, Restarts, ExitCode, ..."""
        line = self.run("scontrol", "show", "job", "-o", number).stdout
        return dict(word.partition("=")[::2] for word in line.split() if "=" in word)

    def wait_for_job(self, number: str, *states: str, limit_s: float = 120) -> dict[str, str]:
        wait_for(lambda: self.job(number)["JobState"] in states, limit_s=limit_s, what=f"job {number}: {states}")
        return self.job(number)


@contextmanager
def cluster(folder: Path, nodes: int = 2, grace_s: int = 30) -> Iterator[Cluster]:
    started = Cluster(folder, nodes, grace_s)
    try:
        started.start()
        yield started
    finally:
        started.stop()


def wait_for(holds: Callable[[], bool], limit_s: float = 30, what: str = "") -> None:
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, f"waited {limit_s:g} s in vain for {what or 'it'}"
        time.sleep(0.1)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _descendants(pid: int) -> list[int]:
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return children + [below for child in children for below in _descendants(child)]


if __name__ == "__main__":  # a look by hand: python tests/slurm/cluster.py FOLDER
    import sys

    with cluster(Path(sys.argv[1])) as running:
        print(json.dumps({"SLURM_CONF": running.environment["SLURM_CONF"]}), running.run("sinfo").stdout)
