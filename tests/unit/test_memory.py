"""What is freed is kept for the next step, and given back when memory is short."""

import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading
import torch
from hpcdit.render.memory import keep_freed, release

def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def resident(): return int(open("/proc/self/statm").read().split()[1])

def work():
    torch.set_num_threads(1)
    for _ in range(12):
        torch.ones(10_000_000)
    before = faults()
    for _ in range(20):
        torch.ones(10_000_000)
    print(faults() - before)

if sys.argv[1] == "kept":
    keep_freed()
thread = threading.Thread(target=work)
thread.start()
thread.join()
held = resident()
release()
print(held - resident())
"""
PAGES = 40_000_000 // resource.getpagesize()  # of one of the twenty tensors


@pytest.mark.skipif(sys.platform != "linux", reason="about the C library of Linux")
@pytest.mark.parametrize(("how", "kept"), [("kept", True), ("as it is", False)])
def test_what_a_thread_frees_is_used_again_and_given_back_in_the_end(how: str, kept: bool) -> None:
    command = [sys.executable, "-c", PROGRAM, how]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    faults, given_back = map(int, result.stdout.split())
    assert (faults < PAGES) == kept, f"{faults} faults in twenty tensors of {PAGES} pages"
    if kept:
        assert given_back > 0.8 * PAGES
