"""``make chaos SEED=… SECONDS=… OUT=…``: one run, its table and the verdict; 1 where the promise is broken."""

import argparse
import asyncio
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.chaos.report import table
from tests.chaos.run import run


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=str(__doc__))
    parser.add_argument("--seed", type=int, default=1, help="of the load and the faults")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load; of these the last 15 (of long runs 30) heal")
    parser.add_argument("--out", type=Path, help="folder for report.md, report.json and the histories; must be empty or new")
    options = parser.parse_args()
    folder = (options.out or Path(tempfile.mkdtemp(prefix="rocyard-chaos-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"{folder} is not empty: a run must not be mixed with another")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it must take down what it has started
    verdict = asyncio.run(run(options.seed, options.seconds, folder, lambda text: print(text, flush=True)))
    print(table(verdict))
    print(f"\nreport and histories: {folder}")
    if verdict.problems:
        print(f"again: make chaos SEED={options.seed} SECONDS={options.seconds:g}")
        return 1
    if options.out is None:
        shutil.rmtree(folder / "cluster", ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
