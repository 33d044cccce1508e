"""The program on several hosts on one machine, which share neither memory nor clocks; see tools/shaped_cluster.py."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from tests.system.program import Running, alive
from tools import shaped_cluster
from tools.shaped_cluster import ip

SKEW_S = 1000


def missing() -> str:
    """Why there can be no hosts here; empty if there can."""
    return shaped_cluster.missing(skew=True)


class Hosts(shaped_cluster.Hosts):
    """`count` hosts, the clock of host i SKEW_S * i ahead, and what runs on them."""

    def __init__(self, count: int, folder: Path) -> None:
        super().__init__(count, folder, skew_s=SKEW_S)

    def pids(self) -> list[int]:
        """What runs on the hosts, as this namespace numbers it."""
        names = [self.name(host) for host in range(self.count)]
        return [int(pid) for name in names for pid in ip(f"netns pids {name}").split() if alive(int(pid))]

    def pid(self, host: int, inner: int) -> int | None:
        """The process that `host` numbers `inner`, as this namespace numbers it; None where it has ended."""
        for pid in ip(f"netns pids {self.name(host)}").split():
            with contextlib.suppress(OSError):
                (numbers,) = (s for s in Path(f"/proc/{pid}/status").read_text().splitlines() if s.startswith("NSpid"))
                if int(numbers.split()[-1]) == inner:
                    return int(pid)
        return None

    def cut_off(self, host: int) -> None:
        """Pulls the plug of a host's network."""
        ip(f"-n {self.name(host)} link set eth0 down")


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
