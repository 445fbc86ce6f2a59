"""`make load`: a cluster of its own on free ports, locust on it for a bounded time, and its table.

Arguments go to locust, such as ``--users 50 --run-time 60s``. Ends with 1 if any request failed.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from manager.cli.own_cluster import own_cluster

FILE: Final = Path(__file__).parent / "locustfile.py"
DEFAULTS: Final = ("--users", "20", "--spawn-rate", "20", "--run-time", "20s")


def main() -> int:
    """Run it; locust's exit code."""
    print("starting a cluster with two simulated devices", flush=True)
    with own_cluster(os.environ, simulate="1x2:mi300x") as cluster:
        environ = {**os.environ, "ROCYARD_API_KEY": cluster.address.api_key.value}
        argv = [sys.executable, "-m", "locust", "-f", str(FILE), "--headless", "--only-summary", "--exit-code-on-error", "1"]
        return subprocess.run(
            [*argv, "--host", cluster.address.url, *DEFAULTS, *sys.argv[1:]], env=environ, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
