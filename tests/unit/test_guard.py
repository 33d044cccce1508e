"""The guard says why the work was killed, passes on what it is told, and leaves nothing behind."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcdit.guard import HEARING_S, let_hear

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")

# The work tells its process id, then does what the test is about.
PROGRAM = """
import os, signal, sys, time
from hpcdit import guard

def work(tell_guard):
    {prepare}
    print(os.getpid(), flush=True)
    {act}
    return 0

guard.STANDS_S = 2
guard.run(work)
"""


def program(act: str, prepare: str = "pass") -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(prepare=prepare, act=act)]


@contextlib.contextmanager
def started(act: str, prepare: str = "pass") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The guard's process and the process id of its work, which has said that it runs."""
    process = subprocess.Popen(
        program(act, prepare), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def finished(act: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        program(act),
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
        capture_output=True,
        timeout=30,
    )


def gone(pid: int, within_s: float = 5) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.02)
                continue
        return True
    return False


@pytest.mark.parametrize("code", [0, 2, 75])
def test_exit_codes_pass(code: int) -> None:
    result = finished(f"return {code}")
    assert (result.returncode, result.stderr) == (code, "")


def test_an_exception_in_the_work_ends_as_in_any_program() -> None:
    result = finished("raise ValueError('no')")
    assert result.returncode == 1
    assert result.stderr.count("ValueError: no") == 1


def test_killed_work_is_named_with_its_rank_signal_and_what_to_do() -> None:
    result = finished("os.kill(os.getpid(), 9)", PMI_RANK="3")
    assert result.returncode == 4
    (line,) = result.stderr.splitlines()
    assert line.startswith("hpcdit: rank 3 (host ")
    assert f"process {result.stdout.strip()}" in line
    assert "SIGKILL" in line
    assert "memory" in line
    assert "same command" in line


def test_crashed_work_is_not_put_down_to_memory() -> None:
    result = finished("os.kill(os.getpid(), signal.SIGSEGV)")
    assert result.returncode == 4
    assert "SIGSEGV" in result.stderr
    assert "ran out of memory" not in result.stderr


def test_an_exit_that_is_not_the_program_s_own_is_a_broken_run() -> None:
    result = finished("os._exit(143)", PMI_RANK="1")
    assert result.returncode == 4
    assert "rank 1 (host " in result.stderr and "exit code 143" in result.stderr


@pytest.mark.parametrize(
    "act, where, told",
    [
        ("os.kill(os.getpid(), 9)", {"MPI_LOCALNRANKS": "1"}, b"cmd=abort exitcode=4\n"),
        ("os._exit(4)", {"MPI_LOCALNRANKS": "1"}, b"cmd=abort exitcode=4\n"),
        ("os.kill(os.getppid(), 15); time.sleep(20)", {"MPI_LOCALNRANKS": "1"}, b"cmd=abort exitcode=75\n"),
        ("os.kill(os.getpid(), 9)", {"MPI_LOCALNRANKS": "2"}, b""),
        ("os.kill(os.getpid(), 9)", {"SLURM_STEP_NUM_NODES": "2"}, b"cmd=abort exitcode=4\n"),
        ("os.kill(os.getpid(), 9)", {"SLURM_STEP_NUM_NODES": "1"}, b""),
        # mpirun in an allocation: srun has started mpirun's own processes on both nodes, and all ranks are on this one.
        ("os.kill(os.getpid(), 9)", {"MPI_LOCALNRANKS": "2", "SLURM_STEP_NUM_NODES": "2"}, b""),
        ("return 3", {"MPI_LOCALNRANKS": "1"}, b""),
    ],
)
def test_the_launcher_is_told_when_a_rank_breaks_and_others_are_on_other_hosts(
    act: str, where: dict[str, str], told: bytes
) -> None:
    read, write = os.pipe()
    where = {"PMI_RANK": "0", "PMI_SIZE": "2", "PMI_FD": str(write), **where}
    subprocess.run(
        program(act), cwd=ROOT, env={**os.environ, **where}, capture_output=True, timeout=30, pass_fds=[write]
    )
    os.close(write)
    with open(read, "rb") as said:
        assert said.read() == told


def test_mpi_that_neither_starts_nor_ends_is_given_up() -> None:
    """The main thread may hang in MPI, with Python's lock held."""
    hang = "import ctypes; ctypes.PyDLL(None).sleep(20)"
    result = finished(f"from hpcdit.cluster import alarm\n    with alarm(1): {hang}")
    assert result.returncode == 4
    assert "SIGALRM" in result.stderr and "MPI neither started nor ended" in result.stderr


def test_an_alarm_ends_with_what_it_guards() -> None:
    act = "from hpcdit.cluster import alarm\n    with alarm(1): pass\n    time.sleep(1.5)"
    assert finished(act).returncode == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_a_request_to_stop_is_passed_on(name: str) -> None:
    prepare = f"signal.signal(signal.{name}, lambda *_: sys.exit(75))"
    with started("time.sleep(20)", prepare) as (guard, _):
        guard.send_signal(getattr(signal, name))
        assert guard.wait(timeout=10) == 75


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_request_to_stop_before_the_work_listens_is_a_stop_and_no_crash(name: str) -> None:
    with started("time.sleep(20)") as (guard, work):
        for pid in (guard.pid, work):  # as a terminal sends it; what the guard gets and passes on may come twice
            os.kill(pid, getattr(signal, name))
        _, said = guard.communicate(timeout=10)
        assert (guard.returncode, said) == (75, "")


def test_an_interrupt_is_the_work_s_to_answer() -> None:
    act = "signal.signal(signal.SIGINT, lambda *_: sys.exit(75)); print('ready', flush=True); time.sleep(20)"
    with started(act) as (guard, work):
        assert guard.stdout is not None
        assert guard.stdout.readline() == "ready\n"
        guard.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            guard.wait(timeout=0.3)
        os.kill(work, signal.SIGINT)
        assert guard.wait(timeout=10) == 75


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_a_killed_guard_takes_the_work_with_it() -> None:
    with started("time.sleep(20)") as (guard, work):
        guard.kill()
        guard.wait(timeout=10)
        assert gone(work)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_paused_guard_pauses_the_work_and_both_go_on() -> None:
    def state(pid: int) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    def reaches(pid: int, *states: str) -> bool:
        end = time.monotonic() + 5
        while state(pid) not in states and time.monotonic() < end:
            time.sleep(0.02)
        return state(pid) in states

    # A process group without a terminal ignores SIGTSTP by default: the work here stops itself when told.
    prepare = "signal.signal(signal.SIGTSTP, lambda *_: os.kill(os.getpid(), signal.SIGSTOP))"
    with started("time.sleep(20)", prepare) as (guard, work):
        guard.send_signal(signal.SIGTSTP)
        assert reaches(work, "T") and reaches(guard.pid, "T")
        guard.send_signal(signal.SIGCONT)
        assert reaches(work, "S", "R") and reaches(guard.pid, "S", "R")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_work_that_stands_still_is_killed_in_time_unless_it_goes_on() -> None:
    begin = time.monotonic()
    with started("time.sleep(20)") as (guard, work):
        os.kill(work, signal.SIGSTOP)
        _, said = guard.communicate(timeout=10)
        assert guard.returncode == 4 and "did not go on for 2 s" in said
        assert 1.5 < time.monotonic() - begin < 6
    with started("time.sleep(20)", "tell_guard(0.1)") as (guard, work):
        os.kill(work, signal.SIGSTOP)
        _, said = guard.communicate(timeout=10)
        assert guard.returncode == 4 and "did not go on for 2.1 s" in said
    with started("time.sleep(4); sys.exit(3)") as (guard, work):
        for _ in range(2):
            os.kill(work, signal.SIGSTOP)
            time.sleep(1.2)
            os.kill(work, signal.SIGCONT)
            time.sleep(0.1)
        assert guard.wait(timeout=10) == 3


def test_a_guard_that_was_paused_with_its_work_counts_nothing() -> None:
    with started("time.sleep(3); sys.exit(3)") as (guard, work):
        for pid in (work, guard.pid):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(3.5)
        for pid in (guard.pid, work):
            os.kill(pid, signal.SIGCONT)
        assert guard.wait(timeout=10) == 3


def test_a_request_to_stop_changes_nothing_once_the_work_is_done() -> None:
    """Python gives signals their default handlers back as it ends, which would end the work as if it were stopped."""
    slow = "import atexit; atexit.register(lambda: (print('ends', flush=True), time.sleep(1)))"
    thread = "import threading; threading.Thread(target=time.sleep, args=(5,), daemon=True).start()"  # has its own mask
    with started("pass", f"{slow}; {thread}; signal.signal(signal.SIGTERM, signal.SIG_DFL)") as (guard, _):
        assert guard.stdout is not None
        assert guard.stdout.readline() == "ends\n"
        guard.terminate()
        assert guard.wait(timeout=10) == 0


@pytest.mark.skipif(MPIRUN is None, reason="no mpirun here")
def test_one_rank_that_is_stopped_before_it_listens_stops_all_with_75() -> None:
    """mpirun's own code is the codes of all ranks, or-ed: 4 of any would make it 79."""
    act = """
    from mpi4py import MPI
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    MPI.COMM_WORLD.barrier()
    if MPI.COMM_WORLD.rank == 1:
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(20)
"""
    assert MPIRUN is not None
    command = [MPIRUN, "-n", "3", *program(act.strip())]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert result.returncode == 75, result.stderr


@pytest.mark.skipif(MPIRUN is None, reason="no mpirun here")
def test_a_killed_rank_ends_mpirun_with_4() -> None:
    act = """
    from mpi4py import MPI
    MPI.COMM_WORLD.barrier()
    if MPI.COMM_WORLD.rank == 1:
        os.kill(os.getpid(), 9)
    time.sleep(20)
"""
    assert MPIRUN is not None
    begin = time.monotonic()
    result = subprocess.run(
        [MPIRUN, "-n", "2", *program(act.strip())], cwd=ROOT, text=True, capture_output=True, timeout=60
    )
    assert result.returncode == 4
    assert "hpcdit: rank 1 (host " in result.stderr
    assert time.monotonic() - begin < 15
    assert all(gone(int(pid)) for pid in result.stdout.split())


def test_the_guard_imports_nothing_large() -> None:
    large = "{'torch', 'numpy', 'mpi4py', 'hydra'}"
    code = f"import sys, hpcdit.guard; print(sorted({large} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert result.stdout.strip() == "[]"


def test_what_was_said_is_heard_before_a_launcher_is_asked_to_end_the_run() -> None:
    read, write = os.pipe()
    os.write(write, b"why the run ends\n")
    reader = threading.Timer(0.2, os.read, (read, 100))
    begin = time.monotonic()
    reader.start()
    let_hear(write)
    assert 0.15 < time.monotonic() - begin < HEARING_S / 2
    reader.join()
    let_hear(write)  # nothing is left
    assert time.monotonic() - begin < HEARING_S / 2
    os.write(write, b"to nobody\n")
    let_hear(write)
    assert time.monotonic() - begin > HEARING_S
    for end in (read, write):
        os.close(end)


def test_nobody_is_waited_for_where_output_goes_to_a_file_or_nowhere(tmp_path: Path) -> None:
    begin = time.monotonic()
    with (tmp_path / "log").open("w") as file:
        file.write("said")
        let_hear(file.fileno())
    let_hear(999)
    assert time.monotonic() - begin < HEARING_S / 2
