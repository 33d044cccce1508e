"""Each rank's first process: it waits for the process that does the work, and says why that one was killed.

A process that is killed (kill -9, the out-of-memory killer, a segmentation fault) cannot say so itself, and the
launcher would end the run with the bare number of a signal. When the work of a rank breaks, its guard tells the guards
of the same host, and all end with the same exit code: a launcher that sees one rank end kills the others, and its own
code is then that of the kill. The ranks of other hosts are the launcher's to end, and the guard tells it to. The guard
imports nothing large: it lives as long as the run, beside the work.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import signal
import socket
import stat
import sys
import termios
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

KILLED = 4
STOPPED = 75
OWN = (0, 1, 2, 3, KILLED, STOPPED)  # the codes that the program ends with, and Python after an exception
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
NAME = "hpcdit-guard"  # what ps calls it, and how guards know each other
# From one guard to the others of its host: the run is over, a rank has broken, or was stopped before it could listen.
END, HALT = signal.SIGRTMIN + 1, signal.SIGRTMIN + 2
# For which the work of a rank may be stopped (SIGSTOP) while its guard is not: until it has told, and beyond the
# `transport.timeout_s` that it tells, after which ranks that wait for it say so, and for what.
STANDS_S, BEYOND_S = 60.0, 2.0
LINGER_S = 2.0
HEARING_S = 1.0  # for the launcher to take in what was said
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
RANKS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")

# What asks a run to stop, or to pause. Launchers tell the process that they started, which is the guard.
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGTSTP, signal.SIGCONT)
# A terminal sends these to every process of the run, the work included; the guard outlives them.
LEFT_TO_WORK = (signal.SIGINT, signal.SIGQUIT)
ALL = (*FORWARDED, *LEFT_TO_WORK, END, HALT)

HINTS = {
    signal.SIGKILL: "often the machine ran out of memory: try fewer ranks a node, or smaller videos",
    signal.SIGBUS: "often shared memory (/dev/shm) is full: `df -h /dev/shm` tells",
    signal.SIGSEGV: "a crash in native code: PYTHONFAULTHANDLER=1 tells where",
    signal.SIGABRT: "a crash in native code: PYTHONFAULTHANDLER=1 tells where",
    signal.SIGALRM: "MPI neither started nor ended in time: does every host start its ranks, and reach the others?",
}


def run(main: Callable[[Callable[[float], None]], int]) -> NoReturn:
    """Calls `main` in a child process and exits as it does; with 4 and one line on stderr when it is killed.

    `main` gets a function, to be told `transport.timeout_s` once that is known.

    Call it before MPI starts, before anything large is imported and before there are threads. A signal that
    asks the run to stop is passed on; where a launcher sends it to both processes, the child gets it twice, and
    its handlers must bear that.
    """
    # Held back until both processes have their own handlers, so that none is lost in between.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ALL)
    stands = ctypes.c_double.from_buffer(mmap.mmap(-1, mmap.PAGESIZE))  # memory that both processes share
    stands.value = STANDS_S
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        _die_with(guard)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # whose traceback each rank would print
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        code = main(lambda timeout_s: setattr(stands, "value", timeout_s + BEYOND_S))
        for number in (*FORWARDED, *LEFT_TO_WORK):  # how the run ends is decided; a mask would be this thread's alone
            signal.signal(number, signal.SIG_IGN)
        sys.exit(code)
    _prctl(PR_SET_NAME, NAME.encode())
    asked = _watch_signals(child)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    status = _wait(child, asked, stands)
    # From here on nothing may end this process but its own exit: Python puts the default handlers back as it ends.
    signal.pthread_sigmask(signal.SIG_BLOCK, ALL)
    code = KILLED if END in asked else STOPPED if HALT in asked else _exit_code(child, status, asked, stands.value)
    # Also where a signal ended the work as it was asked to: a launcher does not notice a rank that never reached MPI.
    if _launched() and (code in (1, KILLED) or os.WIFSIGNALED(status)):
        _end_run(code)
    sys.exit(code)


def _die_with(guard: int) -> None:
    """Nothing is left over when the guard itself is killed (Linux)."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:  # it was gone before the request was made
        os._exit(KILLED)


def _prctl(option: int, value: int | bytes) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value)


def _watch_signals(child: int) -> set[int]:
    """Passes signals on to the child; returns the set that will hold those that were."""
    asked: set[int] = set()

    def forward(number: int, _frame: FrameType | None) -> None:
        asked.add(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
        if number == signal.SIGTSTP:
            os.kill(os.getpid(), signal.SIGSTOP)

    def end(number: int, _frame: FrameType | None) -> None:
        asked.add(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

    for number in (END, HALT):
        signal.signal(number, end)
    for number in FORWARDED:
        signal.signal(number, forward)
    for number in LEFT_TO_WORK:
        signal.signal(number, signal.SIG_IGN)
    return asked


def _wait(child: int, asked: set[int], stands: ctypes.c_double) -> int:
    """The status that the child ends with. One that stands still for so many seconds is killed.

    The other ranks notice that, too, and sooner, but not while MPI starts, and not when they have ended. The seconds
    are counted one by one: where all was paused, and this process with it, the child goes on at the same time.
    """
    stood = 0

    def tick(number: int, _frame: FrameType | None) -> None:
        nonlocal stood
        stood += 1
        if stood >= stands.value:
            asked.add(number)
            os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, tick)
    while True:
        _, status = os.waitpid(child, os.WUNTRACED | os.WCONTINUED)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            signal.setitimer(signal.ITIMER_REAL, 0)
            return status
        stood, each_s = 0, float(os.WIFSTOPPED(status))
        signal.setitimer(signal.ITIMER_REAL, each_s, each_s)


def _exit_code(child: int, status: int, asked: set[int], stands_s: float) -> int:
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) in OWN:
        return os.WEXITSTATUS(status)
    if signal.SIGALRM in asked:
        how = f"was stopped, did not go on for {stands_s:g} s, and was killed"
    elif os.WIFEXITED(status):  # MPICH ends processes so, for errors that it lets nobody handle
        how = f"was ended by MPI or the system with exit code {os.WEXITSTATUS(status)}"
    else:
        number = signal.Signals(os.WTERMSIG(status))
        if number in asked or number in LEFT_TO_WORK:  # asked to stop before the work had handlers for it
            return STOPPED
        how = f"was killed by {number.name}" + (f" ({HINTS[number]})" if number in HINTS else "")
    who = f"rank {launched_rank()} (host {socket.gethostname()}, process {child})"
    rest = "finished videos are whole, the same command renders the rest"
    print(f"hpcdit: {who} {how}; {rest}", file=sys.stderr, flush=True)
    return KILLED


def _end_run(code: int) -> None:
    """Has all other ranks end too, and the launcher, where it has a say, with `code`."""
    _end_host(HALT if code == STOPPED else END)
    # MPICH's launcher, and srun, leave other hosts alone when a rank ends by itself, but do what MPI_Abort would ask
    # them for.
    launcher = os.environ.get("PMI_FD", "")
    if launcher.isdigit() and _several_hosts():
        let_hear()
        with contextlib.suppress(OSError):
            os.write(int(launcher), b"cmd=abort exitcode=%d\n" % code)


def _several_hosts() -> bool:
    """Whether the launcher, MPICH's or srun, has started ranks on other hosts as well."""
    here, everywhere, hosts = (os.environ.get(n, "") for n in ("MPI_LOCALNRANKS", "PMI_SIZE", "SLURM_STEP_NUM_NODES"))
    if here.isdigit() and everywhere.isdigit():
        return int(everywhere) > int(here)
    return hosts.isdigit() and int(hosts) > 1


def let_hear(stream: int = 2) -> None:
    """Waits until what was written to `stream` has been read, where that is a pipe, for HEARING_S at most.

    A launcher that is asked to end the run may do so before it looks at what its processes have said last.
    """
    deadline = time.monotonic() + HEARING_S
    with contextlib.suppress(OSError):
        piped = stat.S_ISFIFO(os.fstat(stream).st_mode)
        while piped and any(fcntl.ioctl(stream, termios.FIONREAD, bytes(4))) and time.monotonic() < deadline:
            time.sleep(0.005)


def _end_host(how: int) -> None:
    """Has the other ranks of this host end, by END or HALT; those that do not are killed after LINGER_S.

    A process of its own sees to that, and keeps the connection to the launcher open until they are gone: a launcher
    that finds it closed (MPICH's does) kills them in the middle, and reports that.
    """
    launcher, others = os.getppid(), _siblings()
    for pid in others:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)
    if not others or os.fork() > 0:
        return
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    deadline = time.monotonic() + LINGER_S
    while (left := [pid for pid in others if _is_guard(pid, launcher)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _siblings() -> list[int]:
    """The guards that the same launcher has started on this host."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()] if sys.platform == "linux" else []
    return [pid for pid in pids if pid != os.getpid() and _is_guard(pid, os.getppid())]


def _is_guard(pid: int, launcher: int) -> bool:
    """Whether `pid` is a living guard that `launcher` has started."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            name, _, rest = file.read().partition("(")[2].rpartition(") ")
    except OSError:
        return False
    state, parent = rest.split()[:2]
    return name == NAME and state != "Z" and int(parent) == launcher


def _launched() -> bool:
    """Whether there are other ranks; one process in a batch script has Slurm's variables too, and no others."""
    return any(os.environ.get(name, "").isdigit() and int(os.environ[name]) > 1 for name in SIZES)


def launched_rank() -> int:
    """This process's rank as the launcher tells it, 0 without one; for what is said before or after MPI."""
    for name in RANKS:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0
