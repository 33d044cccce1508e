#!/usr/bin/env bash
# Renders the demo on this machine: four small videos, on four ranks, without a GPU.
#
#   bash tools/demo.sh                                    as it is
#   bash tools/demo.sh sampling.seed=5 output.dir=mine    with keys of `python -m hpcdit --help` changed
#
# Sets up .venv the first time. Safe to run again: videos that are there already are kept.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=setup_venv.sh
source "$root/tools/setup_venv.sh" mpich

out=$root/outputs/demo
for argument in "$@"; do
    case $argument in
        output.dir=*) out=${argument#*=} ;;
        -* | mode=plan | mode=report) out= ;; # only prints something
    esac
done

# Two ranks stand for a node, so that the demo also shows what happens between nodes.
"$root/.venv/bin/mpirun" -n 4 "$python" -m hpcdit output.dir="$root/outputs/demo" output.video=mp4 \
    cluster.ranks_per_node=2 "$@"

[ -n "$out" ] || exit 0
"$python" -m hpcdit mode=report output.dir="$out" >/dev/null
cat <<TEXT

The videos are in $out/videos:
$(cd "$out/videos" && printf '  %s\n' *)
Look at them with any player or browser, for example:  xdg-open '$out/videos'
From another machine:  scp -r $HOSTNAME:'$out/videos' .
Each .h5 file holds the frames, prompt, seed, settings and timings of one video, for h5py or h5dump.

See what you got and where the time went, in any browser:
  $out/report.html
TEXT
