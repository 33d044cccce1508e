"""Runs under mpirun: calls the named case function of a module with COMM_WORLD and prints what it returns as JSON.

`mpirun -n 6 python -m tests.mpi.under_mpi tests.mpi.cases transports`

Several, each with its arguments, are cut by `+`. The first that fails ends all.
"""

import importlib
import itertools
import json
import os
import sys
import traceback

from hpcdit.cluster import MPI  # asks MPI for threads before anything else starts it

if __name__ == "__main__":
    for cut, several in itertools.groupby(sys.argv[1:], lambda word: word == "+"):
        if cut:
            continue
        module, function, *words = several
        try:
            result = getattr(importlib.import_module(module), function)(MPI.COMM_WORLD, *words)
        except BaseException:
            print(f"rank {MPI.COMM_WORLD.rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            MPI.COMM_WORLD.Abort(1)
            os._exit(1)  # where another rank was first, Abort may return
        if MPI.COMM_WORLD.rank == 0:
            print("RESULT " + json.dumps(result), flush=True)
