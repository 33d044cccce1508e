"""Nodes made of one machine: a network as slow as asked, nothing shared beside it, and nothing left behind."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.require import needs
from tests.system.hosts import missing
from tools import shaped_cluster
from tools.shaped_cluster import BIN, ip

ROOT = Path(__file__).parents[2]
TOOL = (sys.executable, str(ROOT / "tools" / "shaped_cluster.py"))
MBIT, MBYTE = 200, 8

netns = needs("netns", missing())
unshaped = missing() or shaped_cluster.missing(rate=True)  # a kernel may have namespaces and no sch_tbf

# Every rank sends its share of MBYTE to the other node at once; the seconds are those of the slowest.
TRANSFER = """
import json, sys, time
import numpy as np
from hpcdit.cluster import MPI, Cluster, World

world = World()
cluster = Cluster(world)
here = np.full(int(sys.argv[1]) // cluster.nodes.count(cluster.node), world.rank, np.uint8)
there = np.empty_like(here)
peer = (world.rank + world.size // 2) % world.size
world.barrier("the start")
start = time.perf_counter()
requests = [world.comm.Irecv(there, peer), world.comm.Isend(here, peer)]
world.wait(lambda: MPI.Request.Testall(requests), [peer], "the bytes")
seconds = world.largest(time.perf_counter() - start, "the seconds")
wrong = world.largest((there != peer).any(), "the bytes")
if world.rank == 0:
    print("RESULT", json.dumps([cluster.nodes, cluster.node_count, seconds, wrong]), flush=True)
cluster.close()
world.close()
"""


def left(pid: int, folder: Path) -> list[str]:
    """The namespaces that the tool with this process id has made, and the processes that name `folder`."""
    found = [line for line in ip("netns list").splitlines() if line.split()[0].split("-")[0] == f"hpcdit{pid}"]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:  # ended meanwhile
            continue
        if str(folder).encode() in words:
            found.append(f"{path}: {words!r}")
    return found


@needs("tc", unshaped)
def test_two_nodes_share_no_memory_and_bytes_cross_no_faster_than_the_rate(tmp_path: Path) -> None:
    script = tmp_path / "transfer.py"
    script.write_text(TRANSFER)
    options = ("--nodes", "2", "--ranks-per-node", "2", "--rate", f"{MBIT}mbit")
    command = [*TOOL, *options, "--", sys.executable, str(script), str(MBYTE * 10**6)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as tool:
        out, errors = tool.communicate(timeout=60)
    assert tool.returncode == 0, errors
    (line,) = (line for line in out.splitlines() if line.startswith("RESULT "))
    nodes, count, seconds, wrong = json.loads(line.removeprefix("RESULT "))
    assert nodes == [0, 0, 1, 1] and count == 2
    assert not wrong
    assert seconds > MBYTE * 8 / MBIT * 0.8  # a little of the first bytes passes at once
    assert not left(tool.pid, tmp_path)


@netns
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_after_a_signal(stop: signal.Signals, tmp_path: Path) -> None:
    words = ["bash", "-c", "'touch $0/rank$PMI_RANK; sleep 1000'", str(tmp_path)]
    command = [*TOOL, "--nodes", "2", "--", "bash", "-c", " ".join(words)]
    with subprocess.Popen(command, cwd=tmp_path) as tool:
        end = time.monotonic() + 30
        while len(list(tmp_path.glob("rank?"))) < 2:
            assert tool.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        assert left(tool.pid, tmp_path)
        tool.send_signal(stop)
        assert tool.wait(30) == 128 + stop
    assert not left(tool.pid, tmp_path)


@netns
def test_a_command_that_fails_leaves_nothing_and_its_exit_code(tmp_path: Path) -> None:
    with subprocess.Popen([*TOOL, "--nodes", "2", "--", "bash", "-c", "exit 3"], cwd=tmp_path) as tool:
        assert tool.wait(30) == 3
    assert not left(tool.pid, tmp_path)


@needs("tc", unshaped)
def test_a_rate_that_tc_does_not_know_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with subprocess.Popen([*TOOL, "--rate", "fast", "--", "true"], cwd=tmp_path, stderr=subprocess.PIPE) as tool:
        errors = tool.communicate(timeout=30)[1].decode()
    assert tool.returncode == 2
    assert errors.count("\n") == 1 and "fast" in errors
    assert not left(tool.pid, tmp_path)


def test_without_ip_it_says_what_it_needs_in_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path)}
    ended = subprocess.run([*TOOL, "--", "true"], env=environment, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1 and "needs Linux, root, `ip`, `tc` and `unshare`" in ended.stderr


BENCH = (sys.executable, str(ROOT / "tools" / "bench" / "attention.py"), "--length", "64", "--heads", "4", "--dim", "8")


@netns
def test_the_benchmark_prints_a_checked_table_on_two_nodes(tmp_path: Path) -> None:
    options = ("--x", "1", "--layers", "2", "--repeat", "2", "--csv", str(tmp_path / "cells.csv"))
    rate = () if unshaped else ("--rate", "100mbit")
    command = [*TOOL, "--nodes", "2", "--ranks-per-node", "2", *rate, "--", *BENCH, *options]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("PACED kernels") and "2 nodes x 2 ranks" in ended.stdout
    assert "best other" in ended.stdout and "simulator:" in ended.stdout
    elements = 2 * (2 - 1) * 64 * 4 * 8  # the formula of USP; on two nodes the others send as many
    counts = [line.split()[-2:] for line in ended.stdout.split("elements across nodes")[1].splitlines()[2:7]]
    assert counts == [[str(elements)] * 2] * 5
    with (tmp_path / "cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["kernels"] for row in rows} == {"paced"} and rows[-1]["method"] == "auto"
    assert all(float(row["median"]) > 0 for row in rows)


def test_the_benchmark_refuses_layouts_that_do_not_fit_in_one_line(tmp_path: Path) -> None:
    for layouts in ("torus 2x3", "spiral 2x1"):
        command = [str(BIN / "mpirun"), "-n", "2", *BENCH, "--ranks-per-node", "1", "--layouts", layouts]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.count("\n") == 1 and ended.stderr.startswith("bench: ")
