"""A real Slurm cluster on one machine: slurmctld, munged, and a slurmd for each node.

A node has its own host name, process ids, /dev/shm and loopback address. No systemd, no cgroups, nothing outside
the cluster's folder; killing a node's process 1 is a power cut. Needs root, and Debian's packages (see `install`).
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
_NODE = Path(__file__).with_name("node.sh")
# Below the ephemeral range, and different from those of a concurrent test run; ranks rendezvous from port 20000 on.
_PORT = 30000 + os.getpid() % 250 * 10
_STARTED = itertools.count()  # clusters of this process, some of which run at the same time

_SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
# Ranks meet at a port that follows from the job's number: clusters of two test workers number theirs apart.
FirstJobId={first_job}
# Not NoInAddrAny: a step would listen on its node's address while loopback's source address is 127.0.0.1, and hang.
CommunicationParameters=NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire: a requeued job waits until the credentials of its first start have expired, two minutes by default.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={spool}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1
ReturnToService=2
SlurmdTimeout=10
KillWait=5
# The nodes claim more cores than the machine has.
SlurmdParameters=config_overrides
GresTypes=gpu,hpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


_UNANSWERED = ("Zero Bytes were transmitted", "Unable to contact slurm controller", "Socket timed out")


def install() -> str | None:
    """Install Slurm if it is missing; returns why a cluster cannot run here, or None."""
    if os.name != "posix" or os.geteuid() != 0:
        return "a local Slurm cluster needs root"
    if subprocess.run(["unshare", "--mount", "--uts", "--pid", "--fork", "true"], check=False).returncode:
        return "this container may not create namespaces"
    if all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "munged"))):
        return None
    if shutil.which("apt-get") is None:
        return f"Slurm is not installed: {', '.join(PACKAGES)}"
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for attempt in (command, ["apt-get", "update"], command):
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(attempt, env=environment, capture_output=True, timeout=120, check=False)
            if attempt is command and done.returncode == 0:
                return None
    return f"apt-get cannot install {', '.join(PACKAGES)}"


@dataclass
class LocalCluster:
    """A running cluster; commands take `environment`."""

    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *words: str) -> str:
        """Output of a Slurm command; retried while the controller starts or is too busy to answer."""
        end = time.monotonic() + 60
        while True:
            done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
            if done.returncode == 0:
                return done.stdout
            unanswered = any(sign in done.stderr for sign in _UNANSWERED)
            assert unanswered, f"{' '.join(words)}: {done.stderr}"
            assert time.monotonic() < end, f"{' '.join(words)} is not answered: {done.stderr}"
            time.sleep(0.5)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..., of a job or of one task of an array (`123_0`)."""
        return self.facts(job)["JobState"]

    def facts(self, job: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, reached: Callable[[], bool], what: str, seconds: float = 120) -> None:
        """Wait until `reached` is true; fails after `seconds`."""
        end = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < end, f"no {what} after {seconds:.0f} s; logs in {self.folder}"
            time.sleep(0.1)

    def wait_end(self, job: str, seconds: float = 180) -> str:
        """Wait for the end of a job; returns its state."""
        running = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED"}
        self.wait(lambda: self.state(job) not in running, f"end of job {job}", seconds)
        return self.state(job)

    def lose_slurmd(self, node: str) -> None:
        """Make Slurm lose sight of a node whose processes keep running."""
        pid = int((self.folder / f"slurmd-{node}.pid").read_text())
        outside = _outside(self.processes[node].pid, pid)
        os.kill(outside, signal.SIGKILL)


@contextmanager
def local_cluster(folder: Path, nodes: int) -> Iterator[LocalCluster]:
    """Start a cluster; everything ends with the block."""
    cluster = LocalCluster(folder)
    spool = Path(tempfile.mkdtemp(prefix="slurm-"))  # holds Unix sockets, whose paths have at most 108 characters
    try:
        _configure(folder, spool, nodes)
        _start(cluster, nodes)
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        cluster.wait(lambda: cluster.run(*idle).strip() == str(nodes), f"{nodes} idle nodes", 30)
        yield cluster
    finally:
        for name, process in reversed(cluster.processes.items()):
            if name.startswith("node"):
                process.kill()
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=10)
        shutil.rmtree(spool, ignore_errors=True)


def _configure(folder: Path, spool: Path, nodes: int) -> None:
    (folder / "state").mkdir(parents=True)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    number = next(_STARTED)
    port, network = _PORT + 5 * (number % 2), f"127.0.{20 + (2 * os.getpid() + number) % 200}"
    names = [f"node{k}" for k in range(1, nodes + 1)]
    hosts = [f"{network}.{k} {name}\n" for k, name in enumerate(names, 1)]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(hosts))
    # Slurm requires a device file for each GPU: a second /dev/null.
    os.mknod(folder / "gpu0", 0o666 | 0o020000, os.makedev(1, 3))
    gres = f"NodeName=node[1-{nodes}] Name=gpu File={folder}/gpu0\nNodeName=node[1-{nodes}] Name=hpu Count=8\n"
    (folder / "gres.conf").write_text(gres)
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    lines = [
        f"NodeName={name} NodeHostname={name} NodeAddr={network}.{k} Port={port + k} CPUs=16 RealMemory=16000 "
        "Gres=gpu:1,hpu:8 State=UNKNOWN"
        for k, name in enumerate(names, 1)
    ]
    (folder / "slurm.conf").write_text(
        _SLURM_CONF.format(
            folder=folder, spool=spool, port=port, first_job=1 + os.getpid() % 250 * 40, nodes="\n".join(lines)
        )
    )


def _start(cluster: LocalCluster, nodes: int) -> None:
    folder = cluster.folder

    def start(name: str, *words: str) -> None:
        with (folder / f"{name}.out").open("wb") as out:
            cluster.processes[name] = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, env=cluster.environment
            )

    # --force: munged rejects folders that only their owner may enter, such as those of pytest.
    start(
        "munged", "munged", "--foreground", "--force", f"--key-file={folder}/munge.key",
        f"--socket={folder}/munge.sock", f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed",
    )  # fmt: skip
    cluster.wait((folder / "munge.sock").exists, "munged", 30)
    start("slurmctld", "slurmctld", "-D", "-f", str(folder / "slurm.conf"))
    for k in range(1, nodes + 1):
        start(
            f"node{k}", "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc",
            "--propagation", "private", "bash", str(_NODE), str(folder), f"node{k}",
        )  # fmt: skip


def _outside(ancestor: int, inside: int) -> int:
    """The process id, in this namespace, of the process with id `inside` in a descendant's namespace."""
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            lines = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            numbers = lines.get("NSpid", "").split()
            if numbers[-1:] == [str(inside)] and len(numbers) > 1 and _descends(int(numbers[0]), ancestor):
                return int(numbers[0])
    raise AssertionError(f"no process {inside} below {ancestor}")


def _descends(process: int, ancestor: int) -> bool:
    while process > 1 and process != ancestor:
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return process == ancestor
