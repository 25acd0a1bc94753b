"""A real Slurm cluster on one machine: munge, slurmctld and one slurmd per node, each node with its own network address,
host name and process tree, so that a node can lose its network or power.

Everything is removed at the end. Needs root, and Debian's slurm-wlm, munge and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "ip", "unshare", "nsenter", "mknod")
CORES = 16
_STARTUP_SECONDS = 60.0
_COMMAND_SECONDS = 600.0
# Adopts and reaps orphaned processes, like the init process of a machine.
_INIT = "trap : CHLD TERM; while :; do sleep 3600 & wait; done"


def missing_requirement() -> str | None:
    """Return why no cluster can run on this machine; None if it can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]
    if missing:
        return f"no {missing[0]} here: apt-get install slurm-wlm munge iproute2"
    if os.geteuid() != 0:
        return "the cluster's daemons and namespaces need root"
    if subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True, check=False).returncode:
        return "namespaces are not permitted here"
    return None


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Machine:
    """A host with its own network, name, mounts and processes."""

    def __init__(self, name: str, address: str, hosts: Path):
        self.name, self.address = name, address
        spaces = ["--net", "--mount", "--uts", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        self.holder = subprocess.Popen(
            ["unshare", *spaces, "bash", "-c", _INIT], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.daemons: list[subprocess.Popen[bytes]] = []
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children")
        until = time.monotonic() + 10
        while not (first := children.read_text(encoding="utf-8").split()) and time.monotonic() < until:
            time.sleep(0.01)
        self.init = int(first[0])
        self.do("mount", "--bind", str(hosts), "/etc/hosts")
        self.do("hostname", name)
        self.do("ip", "link", "set", "lo", "up")

    def entering(self, folder: Path | None = None) -> list[str]:
        """Return the prefix of a command that runs on this host, in a folder."""
        spaces = ["--net", "--mount", "--uts", "--pid", "--ipc"]
        return ["nsenter", "--target", str(self.init), *spaces, f"--wdns={folder or '/'}", "--"]

    def do(self, *command: str, environment: Mapping[str, str] | None = None) -> str:
        """Run a command on this host that must succeed; return its output."""
        done = self.run(*command, environment=environment)
        assert done.returncode == 0, f"{self.name}: {command}: {done.stdout}{done.stderr}"
        return done.stdout

    def run(
        self, *command: str, environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this host."""
        return subprocess.run(
            [*self.entering(folder), *command],
            capture_output=True, text=True, check=False, timeout=_COMMAND_SECONDS,
            env={**os.environ, "PATH": _PATH, **(environment or {})},
        )  # fmt: skip

    def start_daemon(self, *command: str, environment: Mapping[str, str], log: Path) -> None:
        """Start a daemon on this host."""
        with log.open("ab") as out:
            self.daemons.append(
                subprocess.Popen(
                    [*self.entering(), *command],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                    env={**os.environ, "PATH": _PATH, **environment},
                )
            )

    def power_off(self) -> None:
        """Kill every process of this host at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)
        for process in (*self.daemons, self.holder):
            process.wait()
        self.daemons = []


class Cluster:
    """A login node that also runs the controller, and compute nodes with cores and GPUs."""

    def __init__(self, place: Path, names: Sequence[str], gpus: int):
        self.place, self.names, self.gpus = place, names, gpus
        self.conf = place / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.conf)}
        self.nodes: dict[str, Machine] = {}
        place.mkdir(parents=True, exist_ok=True)
        self._write_configuration()
        self.login = Machine("login", "10.77.0.1", place / "hosts")

    def start(self) -> None:
        """Start the network, the nodes and the daemons."""
        self.login.do("ip", "link", "add", "br0", "type", "bridge")
        self.login.do("ip", "address", "add", "10.77.0.1/24", "dev", "br0")
        self.login.do("ip", "link", "set", "br0", "up")
        for number in range(len(self.names)):
            self._add_node(number)
        self._start_daemons()

    def _write_configuration(self) -> None:
        """Write the configuration, and device files that Slurm uses as GPUs."""
        for folder in ("state", "munge", *(f"spool-{name}" for name in self.names)):
            (self.place / folder).mkdir(exist_ok=True, mode=0o755 if folder != "munge" else 0o700)
        key = self.place / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        for number in range(self.gpus):
            device = self.place / f"gpu{number}"
            subprocess.run(["mknod", "-m", "666", str(device), "c", "1", "3"], check=True, env={"PATH": _PATH})
        addresses = {name: f"10.77.0.{10 + number}" for number, name in enumerate(self.names)}
        # Only Slurm knows the addresses of the nodes, as on clusters whose node names do not resolve.
        lines = ["127.0.0.1 localhost", "10.77.0.1 login"]
        (self.place / "hosts").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (self.place / "gres.conf").write_text(f"Name=gpu File={self.place}/gpu[0-{self.gpus - 1}]\n", encoding="utf-8")
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={address} CPUs={CORES} RealMemory=1000000 Gres=gpu:{self.gpus} State=UNKNOWN"
            for name, address in addresses.items()
        )
        self.conf.write_text(
            f"""\
ClusterName=test
SlurmctldHost=login(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={self.place}/munge/socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=5
KillWait=15
SlurmdParameters=config_overrides
StateSaveLocation={self.place}/state
SlurmdSpoolDir={self.place}/spool-%n
SlurmctldPidFile={self.place}/slurmctld.pid
SlurmdPidFile={self.place}/slurmd-%n.pid
SlurmctldLogFile={self.place}/slurmctld.log
SlurmdLogFile={self.place}/slurmd-%n.log
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
PartitionName=spare Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
""",
            encoding="utf-8",
        )

    def _add_node(self, number: int) -> None:
        name = self.names[number]
        self.nodes[name] = node = Machine(name, f"10.77.0.{10 + number}", self.place / "hosts")
        link = f"veth-{name}"
        # In the login node's network namespace only: its process namespace does not contain the node's.
        add_link = [
            "nsenter",
            "--target",
            str(self.login.init),
            "--net",
            "--",
            "ip",
            "link",
            "add",
            link,
            "type",
            "veth",
        ]
        subprocess.run([*add_link, "peer", "name", "eth0", "netns", str(node.init)], check=True, env={"PATH": _PATH})
        self.login.do("ip", "link", "set", link, "master", "br0", "up")
        node.do("ip", "address", "add", f"{node.address}/24", "dev", "eth0")
        node.do("ip", "link", "set", "eth0", "up")

    def _start_daemons(self) -> None:
        munge = self.place / "munge"
        munged = ["munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket"]
        munged += [f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"]
        self.login.start_daemon(*munged, environment={}, log=munge / "out")
        until = time.monotonic() + _STARTUP_SECONDS
        while not (munge / "socket").exists() and time.monotonic() < until:
            time.sleep(0.05)
        self.login.start_daemon("slurmctld", "-D", environment=self.environment, log=self.place / "slurmctld.out")
        for name in self.names:
            self.start_slurmd(name)
        self.await_idle()

    def start_slurmd(self, name: str) -> None:
        """Start the daemon of a node."""
        command = ["slurmd", "-D", "-N", name]
        self.nodes[name].start_daemon(*command, environment=self.environment, log=self.place / f"slurmd-{name}.out")

    def await_idle(self, seconds: float = _STARTUP_SECONDS, without: Sequence[str] = ()) -> None:
        """Wait until every node except `without` is idle."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            done = self.run("sinfo", "--noheader", "--Node", "--format=%N %T")
            states = dict(line.split() for line in done.stdout.splitlines()) if done.returncode == 0 else {}
            if all(states.get(name) == "idle" for name in self.names if name not in without):
                return
            time.sleep(0.1)
        raise AssertionError(f"the nodes do not become idle: {done.stdout}{done.stderr}")

    def run(
        self, *command: str, environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, as a user of the cluster."""
        return self.login.run(*command, environment={**self.environment, **(environment or {})}, folder=folder)

    def job(self, job: str) -> dict[str, str]:
        """Return the fields of a job in the controller."""
        done = self.run("scontrol", "show", "job", "--oneliner", job)
        return dict(field.split("=", 1) for field in done.stdout.split() if "=" in field)

    def set_slurmd_timeout(self, seconds: int) -> None:
        """Set after how many seconds Slurm takes a node that does not answer for lost."""
        text = re.sub(r"SlurmdTimeout=\d+", f"SlurmdTimeout={seconds}", self.conf.read_text(encoding="utf-8"))
        self.conf.write_text(text, encoding="utf-8")
        self.login.do("scontrol", "reconfigure", environment=self.environment)

    def disconnect(self, name: str) -> None:
        """Take down the network of a node."""
        self.login.do("ip", "link", "set", f"veth-{name}", "down")

    def reboot(self, name: str) -> None:
        """Power a node off and on; nothing that ran on it survives."""
        self.nodes[name].power_off()
        self.login.run("ip", "link", "delete", f"veth-{name}")  # unless the kernel removed it with its other end
        self._add_node(self.names.index(name))
        self.start_slurmd(name)

    def stop(self) -> None:
        """Kill every process of the cluster."""
        for machine in (*self.nodes.values(), self.login):
            machine.power_off()


@contextlib.contextmanager
def cluster(place: Path, names: Sequence[str], gpus: int) -> Iterator[Cluster]:
    """Run a cluster within the block."""
    running = Cluster(place, names, gpus)
    try:
        running.start()
        yield running
    finally:
        running.stop()


if __name__ == "__main__":  # interactive: a shell on the login node
    import sys
    import tempfile

    with (
        tempfile.TemporaryDirectory(prefix="cluster-") as folder,
        cluster(Path(folder), ("node1", "node2"), 8) as running,
    ):
        subprocess.run(
            [*running.login.entering(), *(sys.argv[1:] or ["bash"])],
            env={**os.environ, **running.environment},
            check=False,
        )
