#!/usr/bin/env bash
# Runs the tests of all model families with the oldest release of diffusers that setup.cfg admits; the newest is what
# tools/test.sh has. Some minutes, too long for every change: it is for whoever changes an adapter or the range.
#
#   bash tools/test_oldest_diffusers.sh                              the families, types of weights, LoRAs, checkpoints
#   bash tools/test_oldest_diffusers.sh tests/unit/test_rows.py      other tests
#   DIFFUSERS=0.41.0 bash tools/test_oldest_diffusers.sh             another release
#
# The release and what it needs are installed into a folder in /tmp, which is removed at the end.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=setup_venv.sh
source "$root/tools/setup_venv.sh" mpich,dev

cd "$root"
oldest=$(sed -n 's/^ *diffusers >= *\([0-9.]*\),.*/\1/p' setup.cfg)
folder=$(mktemp -d --suffix=-hpcdit-diffusers)
trap 'rm -rf "$folder"' EXIT
# An older release may want an older huggingface_hub; all else stays as it is.
grep -v -e '^diffusers' -e '^huggingface_hub' tools/constraints-cpu.txt >"$folder/constraints.txt"
"$python" -m pip install -qq --disable-pip-version-check --constraint "$folder/constraints.txt" \
    --target "$folder/packages" "diffusers==${DIFFUSERS:-$oldest}"
export PYTHONPATH=$folder/packages:$root
"$python" -c 'import diffusers; print("diffusers", diffusers.__version__, "of", diffusers.__path__[0])'
[ $# -gt 0 ] || set -- tests/mpi/test_families.py tests/unit/test_{wan,lora,lora_diffusers,snapshots}.py
"$python" -m pytest "$@"
