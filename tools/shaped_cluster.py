"""Several nodes on one machine, with a network as slow as one likes: network namespaces joined by a bridge.

    python tools/shaped_cluster.py --nodes 4 --ranks-per-node 2 --rate 400mbit -- python tools/bench/attention.py

starts the command under mpirun with 2 ranks on each of 4 nodes. Ranks of different nodes share neither memory nor
process ids nor a host name, and every node sends and receives at no more than the rate. Nothing stays behind, also
after Ctrl-C, SIGTERM or a command that fails; the exit code is the command's, or 128 + the signal's number.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

BIN = Path(sys.executable).parent
NETWORK = "198.18.0"  # reserved for tests of networks
KILL_S = 10.0  # for what runs on a host to be gone
MOST_NODES = 200  # addresses of the network

# A queue that is too short drops packets of senders that are merely bursty, and makes them look slow.
LATENCY = "400ms"
BURST = "256kb"  # passes at once after a pause
# Bytes that leave a host as one packet, in the end cut for the wire. What is larger than its burst tc cuts by itself:
# that took .6 of a core at 240 Mbit/s, of cores that the ranks compute on, and .02 with this.
PACKET = 16000

# What mpirun calls as ssh: options, the address of a host, a command. mount-proc: programs read /proc.
LAUNCHER = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
host=$((${{1##*.}} - 1))
shift
exec ip netns exec {name}-$host unshare --uts --ipc --pid --fork --mount-proc {clock} \\
    bash -c "hostname host$host; $*"
"""
CLOCK = "--time --monotonic $((host * {skew})) --boottime $((host * {skew}))"


def said(command: str) -> str:
    """What the command says; raises CalledProcessError when it fails."""
    return subprocess.run(shlex.split(command), check=True, capture_output=True, text=True).stdout


def ip(command: str) -> str:
    return said(f"ip {command}")


def missing(rate: bool = False, delay: bool = False, skew: bool = False) -> str:
    """Why there can be no hosts here that have a rate, a delay, clocks of their own; empty if there can."""
    name = f"hpcdit{os.getpid()}"
    try:
        ip(f"netns add {name}")
        try:
            clock = "--time --monotonic 1" if skew else ""
            said(f"ip netns exec {name} unshare --uts --ipc --pid --fork --mount-proc {clock} true")
            for wanted, qdisc in (
                (rate, f"tbf rate 1gbit burst {BURST} latency {LATENCY}"),
                (delay, "netem delay 1ms"),
            ):
                if wanted:
                    said(f"tc -n {name} qdisc replace dev lo root {qdisc}")
        finally:
            ip(f"netns del {name}")
    except (OSError, subprocess.CalledProcessError) as error:
        return (
            f"no such hosts here ({reason(error)}): needs Linux, root, `ip`, `tc` and `unshare` (Debian: iproute2,"
            " util-linux), for --delay also the kernel's sch_netem"
        )
    return ""


def reason(error: OSError | subprocess.CalledProcessError) -> str:
    """One line for a command that could not be run or failed."""
    if isinstance(error, OSError):
        return str(error)
    lines = error.stderr.strip().splitlines()
    return f"{shlex.join(error.cmd)}: {lines[0] if lines else error.returncode}"


class Hosts:
    """`count` hosts, from `with` on until its end."""

    def __init__(
        self,
        count: int,
        folder: Path,
        rate: str | None = None,
        burst: str = BURST,
        delay: str | None = None,
        skew_s: int = 0,
    ) -> None:
        """folder: for the launcher's script.

        rate: of each host, in each direction, as tc writes it (400mbit); burst: what passes at once after a pause;
        delay: of a packet on its way from host to host (50us), beside what queues add. skew_s: the monotonic clock of
        host i is skew_s * i ahead.
        """
        self.count, self.launcher = count, folder / "launcher.sh"
        self.rate, self.burst, self.delay, self.skew_s = rate, burst, delay, skew_s
        self._name = f"hpcdit{os.getpid()}"  # also the namespace of mpirun, with the bridge: this one stays as it is

    def name(self, host: int) -> str:
        """The namespace of a host."""
        return f"{self._name}-{host}"

    def __enter__(self) -> Self:
        clock = CLOCK.format(skew=self.skew_s) if self.skew_s else ""
        self.launcher.write_text(LAUNCHER.format(name=self._name, clock=clock))
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
        there = self.name(host)
        ip(f"netns add {there}")
        ip(f"-n {self._name} link add port{host} type veth peer name eth0 netns {there}")
        ip(f"-n {there} link set eth0 gso_max_size {PACKET}")
        ip(f"-n {self._name} link set port{host} gso_max_size {PACKET}")
        ip(f"-n {self._name} link set port{host} master bridge up")
        ip(f"-n {there} addr add {NETWORK}.{host + 1}/24 dev eth0")
        for device in ("lo", "eth0"):
            ip(f"-n {there} link set {device} up")
        where = "root"
        if self.delay:  # on the host's end alone, so that a packet meets it once; long enough a queue for any rate
            said(f"tc -n {there} qdisc add dev eth0 root handle 1: netem delay {self.delay} limit 1000000")
            where = "parent 1:1"
        if self.rate:  # what the host sends, and what it receives
            tbf = f"tbf rate {self.rate} burst {self.burst} latency {LATENCY}"
            said(f"tc -n {there} qdisc add dev eth0 {where} {tbf}")
            said(f"tc -n {self._name} qdisc add dev port{host} root {tbf}")

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes whatever is there of the hosts, and what runs on them, the launcher first: it starts the others."""
        there = {line.split()[0] for line in ip("netns list").splitlines()}
        for name in (self._name, *(self.name(host) for host in range(self.count))):
            if name in there:
                end = time.monotonic() + KILL_S
                while (pids := ip(f"netns pids {name}").split()) and time.monotonic() < end:
                    for pid in pids:  # again and again: a launcher may have started another one meanwhile
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(int(pid), signal.SIGKILL)
                    time.sleep(0.01)
                ip(f"netns del {name}")  # and with it its devices

    def mpirun(self, ranks: int, per_host: int) -> list[str]:
        """The start of a command: `per_host` ranks on each host, then on each again, until there are `ranks`."""
        hosts = ",".join(f"{NETWORK}.{host + 1}" for host in range(self.count))
        return [
            *("ip", "netns", "exec", self._name, str(BIN / "mpirun"), "-localhost", f"{NETWORK}.254"),
            *("-launcher", "ssh", "-launcher-exec", str(self.launcher)),
            *("-hosts", hosts, "-ppn", str(per_host), "-n", str(ranks)),
        ]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs a command under mpirun on several nodes made of one machine.")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks-per-node", type=int, default=1)
    parser.add_argument("--rate", help="of each node, in each direction, as tc writes it: 400mbit; none: unlimited")
    parser.add_argument("--burst", default=BURST, help=f"what passes at once after a pause (default {BURST})")
    parser.add_argument("--delay", help="of a packet between nodes, as tc writes it: 50us")
    parser.add_argument("--skew-s", type=int, default=0, help="seconds by which each node's clock is ahead of the last")
    parser.add_argument("command", nargs="+", help="after --: what each rank runs")
    args = parser.parse_args(words)
    if not 1 <= args.nodes <= MOST_NODES or args.ranks_per_node < 1 or args.skew_s < 0:
        parser.error(f"--nodes is 1 to {MOST_NODES}, --ranks-per-node at least 1, --skew-s at least 0")
    if why := missing(rate=bool(args.rate), delay=bool(args.delay), skew=bool(args.skew_s)):
        return fail(why)
    if not (BIN / "mpirun").exists():
        return fail(f"no mpirun in {BIN} (pip install mpich)")
    # From here on signals wait until they are asked for: none comes between the making of a thing and its removal.
    stops = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops | {signal.SIGCHLD})
    try:
        with tempfile.TemporaryDirectory() as folder:
            hosts = Hosts(args.nodes, Path(folder), args.rate, args.burst, args.delay, args.skew_s)
            with hosts:
                ranks = args.nodes * args.ranks_per_node
                # Every host has all cores of this machine, and its ranks would take them for their own.
                os.environ.setdefault("OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) // ranks, 1)))
                os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
                return run([*hosts.mpirun(ranks, args.ranks_per_node), *args.command], stops, before)
    except (OSError, subprocess.CalledProcessError) as error:
        return fail(reason(error))


def run(command: Sequence[str], stops: set[signal.Signals], mask: set[int | signal.Signals]) -> int:
    """The exit code of `command`, or 128 + the number of the signal that came first; all of `stops` are blocked."""
    process = subprocess.Popen(command, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, mask))
    while process.poll() is None:
        came = signal.sigwait({*stops, signal.SIGCHLD})
        if came != signal.SIGCHLD:
            process.kill()
            process.wait()
            return 128 + came
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def fail(why: str) -> int:
    print(f"shaped_cluster: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
