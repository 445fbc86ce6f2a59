"""Draws the README's pictures from a real cluster: ``python docs/pictures.py``, which takes half a minute.

It starts a simulated cluster in a temporary folder, gives it work, and writes what the terminal shows to docs/images/.
"""

import io
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

IMAGES = Path(__file__).parent / "images"
COLUMNS = 86
ROCYARD = [sys.executable, "-m", "manager.cli.main"]


def picture(name: str, title: str, ansi: str) -> None:
    """Write one terminal screen as an SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(ansi.replace("\r", "")))
    svg = console.export_svg(title=title)
    # Fonts from the internet do not load in a page that shows the picture; the reader's own monospaced font does.
    (IMAGES / f"{name}.svg").write_text(re.sub(r"(?s)\s*@font-face \{.*?\}", "", svg))


def main() -> int:
    """Start, submit, draw, stop."""
    with tempfile.TemporaryDirectory(prefix="rocyard-pictures-") as folder:
        environ = os.environ | {
            "ROCYARD_DATA_DIR": folder,
            "FORCE_COLOR": "1",
            "COLUMNS": str(COLUMNS),
            "TERM": "xterm-256color",
        }
        log = Path(folder) / "up.log"
        with log.open("wb") as output:
            up = subprocess.Popen([*ROCYARD, "up", "--simulate", "2x2:mi300x"], env=environ, stdout=output)
        try:
            while "Ctrl-C" not in log.read_text():
                if up.poll() is not None:
                    sys.stderr.write(log.read_text())
                    return 1
                time.sleep(0.1)
            for number in range(14):
                memory = (24, 48, 90)[number % 3]
                args = f'{{"seconds": 20, "memory_bytes": {memory * 9 // 10 << 30}}}'
                subprocess.run([*ROCYARD, "submit", "--memory", f"{memory}GiB", "sleep", args], env=environ, check=True)
            subprocess.run([*ROCYARD, "submit", "--wait", "echo", '{"x": 1}'], env=environ, check=True)
            time.sleep(4)  # for the devices' next reading to show what the tasks hold
            status = subprocess.run([*ROCYARD, "status"], env=environ, check=True, capture_output=True, text=True).stdout
        finally:
            up.terminate()
            up.wait(30)
        text = log.read_text()
        start = re.sub(r"(?s)^.*?(?=[^\n]*Rocyard is up)", "", text).split("stopping")[0].rstrip()
        start = re.sub(r"(?<=KEY=)ry_\w{8}_[\w-]{43}", "ry_…", start.replace(folder, "~/.rocyard"))
        start = re.sub(r"ry_\w{8}_[\w-]{43}", "ry_" + "•" * 52, start)
        picture("up", "make run", start)
        picture("status", "rocyard status", status.rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
