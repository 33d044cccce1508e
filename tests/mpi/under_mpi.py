"""Runs under mpirun: calls the named case function of a module with COMM_WORLD and prints what it returns as JSON.

`mpirun -n 6 python -m tests.mpi.under_mpi tests.mpi.cases transports`
"""

import importlib
import json
import sys
import traceback

from hpcdit.cluster import MPI  # asks MPI for threads before anything else starts it

if __name__ == "__main__":
    try:
        result = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(MPI.COMM_WORLD, *sys.argv[3:])
    except BaseException:
        print(f"rank {MPI.COMM_WORLD.rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        MPI.COMM_WORLD.Abort(1)
    if MPI.COMM_WORLD.rank == 0:
        print("RESULT " + json.dumps(result), flush=True)
