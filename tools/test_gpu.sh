#!/usr/bin/env bash
# Runs the tests that need GPUs, one or two of them: a machine without them fails here.
#
#   bash tools/test_gpu.sh                    all of them
#   bash tools/test_gpu.sh -k kernels         with arguments of pytest
#
# Takes the python3 on the PATH, into which hpcdit is installed with an extra for its CUDA: pip install '.[cuda13,dev]'
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
HPCDIT_REQUIRE=gpu exec python3 -m pytest tests/gpu "$@"
