"""Several hosts on one machine: network namespaces joined by a bridge, started by mpirun as if by ssh.

Ranks of different hosts share neither memory nor process ids nor a host name, nor their clocks: that of host i is
SKEW_S * i ahead.
"""

import contextlib
import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.system.program import BIN, Running, alive

NETWORK = "198.18.0"  # reserved for tests of networks
SKEW_S = 1000

# What mpirun calls as ssh: options, the address of a host, a command. mount-proc: the program reads /proc.
LAUNCHER = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
host=$((${{1##*.}} - 1))
shift
exec ip netns exec {name}-$host unshare --uts --ipc --pid --fork --mount-proc \\
    --time --monotonic $((host * {skew})) --boottime $((host * {skew})) bash -c "hostname host$host; $*"
"""


def ip(command: str) -> str:
    """What `ip` says; raises CalledProcessError when it fails."""
    return subprocess.run(["ip", *shlex.split(command)], check=True, capture_output=True, text=True).stdout


def missing() -> str:
    """Why there can be no hosts here; empty if there can."""
    name = f"hpcdit{os.getpid()}"
    try:
        ip(f"netns add {name}")
        try:
            trial = f"ip netns exec {name} unshare --uts --ipc --pid --fork --mount-proc --time --monotonic 1 true"
            subprocess.run(trial.split(), check=True, capture_output=True)
        finally:
            ip(f"netns del {name}")
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        return (
            f"no network namespaces here ({said}): needs Linux, root, `ip` and `unshare` (Debian: iproute2, util-linux)"
        )
    return ""


class Hosts:
    """`count` hosts, from `with` on until its end."""

    def __init__(self, count: int, folder: Path) -> None:
        self.count, self.launcher = count, folder / "launcher.sh"
        self._name = f"hpcdit{os.getpid()}"  # also the namespace of mpirun, with the bridge: this one stays as it is

    def __enter__(self) -> "Hosts":
        self.launcher.write_text(LAUNCHER.format(name=self._name, skew=SKEW_S))
        self.launcher.chmod(0o755)
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            ip(f"netns add {self._name}")
            ip(f"-n {self._name} link add bridge type bridge")
            ip(f"-n {self._name} addr add {NETWORK}.254/24 dev bridge")
            for device in ("lo", "bridge"):
                ip(f"-n {self._name} link set {device} up")
            for host in range(self.count):
                self._add(host)
            undo.pop_all()
        return self

    def _add(self, host: int) -> None:
        there = f"{self._name}-{host}"
        ip(f"netns add {there}")
        ip(f"-n {self._name} link add port{host} type veth peer name eth0 netns {there}")
        ip(f"-n {self._name} link set port{host} master bridge up")
        ip(f"-n {there} addr add {NETWORK}.{host + 1}/24 dev eth0")
        for device in ("lo", "eth0"):
            ip(f"-n {there} link set {device} up")

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes whatever is there of the hosts, and what runs on them."""
        there = {line.split()[0] for line in ip("netns list").splitlines()}
        for name in sorted(there & {self._name, *(f"{self._name}-{host}" for host in range(self.count))}):
            for pid in ip(f"netns pids {name}").split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            ip(f"netns del {name}")  # and with it its devices

    def mpirun(self, ranks: int, per_host: int) -> list[str]:
        """The start of a command: `per_host` ranks on each host, then on each again, until there are `ranks`."""
        hosts = ",".join(f"{NETWORK}.{host + 1}" for host in range(self.count))
        return [
            *("ip", "netns", "exec", self._name, str(BIN / "mpirun"), "-localhost", f"{NETWORK}.254"),
            *("-launcher", "ssh", "-launcher-exec", str(self.launcher)),
            *("-hosts", hosts, "-ppn", str(per_host), "-n", str(ranks)),
        ]

    def pids(self) -> list[int]:
        """What runs on the hosts, as this namespace numbers it."""
        names = [f"{self._name}-{host}" for host in range(self.count)]
        return [int(pid) for name in names for pid in ip(f"netns pids {name}").split() if alive(int(pid))]

    def pid(self, host: int, inner: int) -> int | None:
        """The process that `host` numbers `inner`, as this namespace numbers it; None where it has ended."""
        for pid in ip(f"netns pids {self._name}-{host}").split():
            with contextlib.suppress(OSError):
                (numbers,) = (s for s in Path(f"/proc/{pid}/status").read_text().splitlines() if s.startswith("NSpid"))
                if int(numbers.split()[-1]) == inner:
                    return int(pid)
        return None

    def cut_off(self, host: int) -> None:
        """Pulls the plug of a host's network."""
        ip(f"-n {self._name}-{host} link set eth0 down")


class RunningOnHosts(Running):
    """The program while it runs on several hosts."""

    def __init__(self, hosts: Hosts, start: Sequence[str], *args: str, cwd: Path, out: str = "out") -> None:
        super().__init__(start, *args, cwd=cwd, out=out)
        self._hosts = hosts

    def pids(self) -> dict[int, int]:
        places = self.places()
        found = {rank: self._hosts.pid(int(host.removeprefix("host")), pid) for rank, (_, host, pid) in places.items()}
        return {rank: pid for rank, pid in found.items() if pid is not None}

    def nobody_left(self, within_s: float = 5) -> bool:
        """Whether nothing of the run is left on any host, after a while for the launcher's own to end."""
        end = time.monotonic() + within_s
        while (left := self._hosts.pids()) and time.monotonic() < end:
            time.sleep(0.05)
        return not left
