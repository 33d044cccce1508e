"""Writes the report of a job: `python -m hpcdit.output.report OUT` writes OUT/report.html and says so."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .page import write


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hpcdit.output.report", description="Writes OUT/report.html.")
    parser.add_argument("out", type=Path, help="the output folder of a run")
    out = parser.parse_args(words).out
    try:
        print(write(out))
    except (OSError, ValueError) as error:
        print("report:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
