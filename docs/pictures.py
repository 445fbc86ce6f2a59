"""Draws the pictures of the documents from a real cluster: ``python docs/pictures.py``, which takes a minute.

It starts a simulated cluster in a temporary folder, gives it work, and writes what the terminal and (with Chromium) the
dashboard show to docs/images/.
"""

import io
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import dask
from distributed import Client
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the tests' browser
IMAGES = ROOT / "docs" / "images"
COLUMNS = 86
ROCYARD = [sys.executable, "-m", "manager.cli.main"]


def picture(name: str, title: str, ansi: str) -> None:
    """Write one terminal screen as an SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(ansi.replace("\r", "")))
    svg = console.export_svg(title=title)
    # Fonts from the internet do not load in a page that shows the picture; the reader's own monospaced font does.
    (IMAGES / f"{name}.svg").write_text(re.sub(r"(?s)\s*@font-face \{.*?\}", "", svg))


def pages(dashboard: str) -> None:
    """Write pages of the dashboard as PNGs."""
    from tests.integration.browser import Browser

    for name, height in (("rocyard", 470), ("gpu", 400)):
        with Browser(width=1280, height=height) as browser:
            browser.open(f"{dashboard}/{name}")
            browser.wait_for("typeof Bokeh !== 'undefined' && Bokeh.documents.length && Bokeh.documents[0].roots().length")
            time.sleep(2)  # for the layout to settle
            browser.screenshot(IMAGES / f"page-{name}.png")


def main() -> int:
    """Start, submit, draw, stop."""
    with tempfile.TemporaryDirectory(prefix="rocyard-pictures-") as folder:
        environ = os.environ | {
            "ROCYARD_DATA_DIR": folder,
            "FORCE_COLOR": "1",
            "COLUMNS": str(COLUMNS),
            "ROCYARD_AUTOSCALER__MODE": "off",
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
            strangers = Path(folder) / "nodes" / "node-1" / "devices" / "faults.json"
            strangers.write_text('{"devices": {"0": {"foreign_bytes": 26843545600}}}')
            found = re.search(r"placement, (\S+)", log.read_text())
            assert found is not None
            dask_client = Client(f"tcp://{found[1]}", set_as_default=False)
            with dask.annotate(gpu={"memory": "16GiB"}):
                futures = [dask_client.submit(time.sleep, 60, pure=False) for _ in range(3)]
            for number in range(20):
                memory = (24, 48, 90)[number % 3]
                args = f'{{"seconds": 40, "memory_bytes": {memory * (5 + number % 5) // 10 << 30}}}'
                subprocess.run([*ROCYARD, "submit", "--memory", f"{memory}GiB", "sleep", args], env=environ, check=True)
            subprocess.run([*ROCYARD, "submit", "--wait", "echo", '{"x": 1}'], env=environ, check=True)
            time.sleep(4)  # for the devices' next reading to show what the tasks hold
            status, top = (
                subprocess.run([*ROCYARD, *words], env=environ, check=True, capture_output=True, text=True).stdout
                for words in (("status",), ("top", "--once"))
            )
            found = re.search(r"(https?://\S+)/status", log.read_text())
            assert found is not None
            pages(re.sub(r"\x1b\[[0-9;]*m", "", found[1]))
            dask_client.cancel(futures)
            dask_client.close()
        finally:
            up.terminate()
            up.wait(30)
        text = log.read_text()
        start = re.sub(r"(?s)^.*?(?=[^\n]*Rocyard is up)", "", text).split("stopping")[0].rstrip()
        start = re.sub(r"(?<=KEY=)ry_\w{8}_[\w-]{43}", "ry_…", start.replace(folder, "~/.rocyard"))
        start = re.sub(r"ry_\w{8}_[\w-]{43}", "ry_" + "•" * 52, start)
        picture("up", "make run", start)
        picture("status", "rocyard status", status.rstrip())
        picture("top", "rocyard top", top.rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
