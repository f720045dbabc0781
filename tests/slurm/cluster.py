"""A real SLURM of two nodes on this machine: Debian's daemons, own ports, nothing left behind."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "munged")
NODES = ("node1", "node2")
GPUS = 2
"""GPUs that each node claims to have, so that the batch scripts run as they are."""
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"}


def lacking() -> str | None:
    """Why no SLURM can be started here, or ``None``."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install --no-install-recommends slurm-wlm munge"
    return None if os.geteuid() == 0 else "SLURM's daemons are started as root here"


def search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Cluster:
    """Daemons, and the commands that connect to them.

    Args:
        folder: configuration, state and logs; short, since it holds a socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {
            "PATH": search_path(),
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def start(self) -> None:
        """Start everything and wait until both nodes are idle."""
        munge = self.folder / "munge"
        for name in ("state", "log", "munge"):
            (self.folder / name).mkdir(mode=0o755)
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        (self.folder / "slurm.conf").write_text(self.configuration(free_ports(3)))
        for number in range(GPUS):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")
        options = ("socket", "key-file", "log-file", "pid-file", "seed-file")
        places = ("socket", "key", "log", "pid", "seed")
        self.spawn(
            "munged",
            "--foreground",
            "--force",
            *(f"--{o}={munge / p}" for o, p in zip(options, places, strict=True)),
        )
        wait_for(lambda: (munge / "socket").exists(), 10, "munged's socket")
        self.spawn("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.states() == {"idle"}, 30, "idle nodes")

    def start_node(self, node: str) -> None:
        """Start a node's daemon, the first time or again."""
        self.spawn(node, "-D", "-N", node, program="slurmd")

    def spawn(self, name: str, *arguments: str, program: str = "") -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [program or name, *arguments], stdout=log, stderr=log, env=self.environment
            )

    def stop(self) -> None:
        """End the jobs, then every daemon."""
        with suppress(subprocess.SubprocessError):
            self.call("scancel", "--user=root")
            self.call("scancel", "--signal=KILL", "--user=root")
            wait_for(lambda: not self.call("squeue", "--noheader"), 30, "an empty queue")
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def configuration(self, ports: list[int]) -> str:
        """The text of ``slurm.conf``."""
        host, folder = socket.gethostname().split(".")[0], self.folder
        memory_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={folder}/munge/socket",
            "CryptoType": "crypto/munge",
            "SlurmctldPort": ports[0],
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool.%n",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd.%n.pid",
            "SlurmctldLogFile": folder / "log/slurmctld.log",
            "SlurmdLogFile": folder / "log/slurmd.%n.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "JobCompType": "jobcomp/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SchedulerType": "sched/builtin",
            "SchedulerParameters": "sched_interval=2",
            "MpiDefault": "none",
            "GresTypes": "gpu",
            "ReturnToService": 2,
            "SlurmdParameters": "config_overrides",
            "KillWait": 10,
            "SlurmdTimeout": 15,
            "JobRequeue": 1,
            "PropagateResourceLimits": "NONE",
        }
        node_ports = f"[{ports[1]},{ports[2]}]"
        return "".join(f"{key}={value}\n" for key, value in settings.items()) + (
            f"NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs=4 "
            f"RealMemory={memory_mb // 3} Gres=gpu:{GPUS} State=UNKNOWN\n"
            "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
        )

    def call(self, *command: str) -> str:
        """Run one of SLURM's commands; returns what it prints."""
        result = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        )
        if result.returncode:
            raise subprocess.SubprocessError(f"{command}: {result.stderr.strip()}")
        return result.stdout.strip()

    def states(self) -> set[str]:
        """States of the nodes."""
        try:
            return set(self.call("sinfo", "--noheader", "--Node", "--format=%T").split())
        except subprocess.SubprocessError:
            return set()

    def job(self, job: str) -> dict[str, str]:
        """Return the output of ``scontrol show job``."""
        text = self.call("scontrol", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, job: str, timeout_s: float = 240) -> tuple[str, int]:
        """Wait for the end of a job, through every restart; returns its state and exit code.

        SLURM holds a job back for two minutes when it is queued again; this makes it two seconds
        (in the second of its end, a node still refuses it).
        """
        lifted = ""

        def over() -> bool:
            nonlocal lifted
            found = self.job(job)
            if held(found) and found["Restarts"] != lifted:
                lifted = found["Restarts"]
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now+2")
            return found["JobState"] in OVER

        wait_for(over, timeout_s, f"the end of job {job}", pause_s=0.5)
        found = self.job(job)
        return found["JobState"], int(found["ExitCode"].split(":")[0])

    def kill_node(self, node: str, job: str) -> None:
        """Take a node away at once: its daemon, and everything of a job that runs on it.

        Keepers first: a keeper that outlives its child reports the child's end to the controller.
        """
        children = [pid for pid in processes_of(job) if runs_on(pid, node)]
        keepers = {parent for parent in map(parent_of, children) if is_keeper(parent)}
        self.daemons[node].kill()
        self.daemons[node].wait()
        for pid in [*keepers, *children]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def held(job: dict[str, str]) -> bool:
    """Whether a job has been queued again, and is held back."""
    return job["JobState"] == "PENDING" and job["Reason"] == "BeginTime"


def wait_for(condition: object, timeout_s: float, what: str, pause_s: float = 0.1) -> None:
    """Wait until a condition holds."""
    assert callable(condition)
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(pause_s)


def free_ports(count: int) -> list[int]:
    """Return ports on which no process listens."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def pids() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def parent_of(pid: int) -> int:
    found = re.search(r"^PPid:\t(\d+)", read(pid, "status"), re.MULTILINE)
    return int(found[1]) if found else 0


def is_keeper(pid: int) -> bool:
    """Whether a process is one of SLURM's own, which are parents of a job's."""
    return read(pid, "cmdline").startswith("slurmstepd")


def processes_of(job: str) -> list[int]:
    """Processes that SLURM started for a job: their environment names it."""
    return [pid for pid in pids() if f"SLURM_JOB_ID={job}" in read(pid, "environ").split("\0")]


def users_of(folder: Path) -> list[int]:
    """Processes that name a folder in their command lines."""
    return [pid for pid in pids() if str(folder) in read(pid, "cmdline")]


def runs_on(pid: int, node: str) -> bool:
    return f"SLURMD_NODENAME={node}" in read(pid, "environ").split("\0")


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A cluster for the time of a block."""
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
