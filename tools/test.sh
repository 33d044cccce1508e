#!/usr/bin/env bash
# Runs every check: style, types and tests.
#
#   bash tools/test.sh                         all of them
#   bash tools/test.sh tests/unit -k config    with arguments of pytest
#
# Sets up .venv the first time. Safe to run again.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=setup_venv.sh
source "$root/tools/setup_venv.sh" mpich,dev

cd "$root"
"$python" -m ruff check
"$python" -m ruff format --check
"$python" -m mypy
"$python" -m pytest "$@"
