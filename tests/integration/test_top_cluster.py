"""`rocyard top` on a real cluster: one frame for pipes, and the live view in a terminal."""

import json
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest

from tests.integration.cluster import Cluster

pytestmark = pytest.mark.integration
TOP = [sys.executable, "-m", "manager.cli.main", "top"]


def test_a_pipe_gets_one_frame(cluster: Cluster) -> None:
    ran = subprocess.run(TOP, env=cluster.environ, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "node-0  live" in ran.stdout
    assert ran.stdout.count("MI300X") == 4
    assert "\x1b" not in ran.stdout
    ran = subprocess.run([*TOP, "-o", "json"], env=cluster.environ, capture_output=True, text=True, timeout=60, check=True)
    assert len(json.loads(ran.stdout)["workers"]) == 2


class Terminal:
    """A program in a terminal of 80 × 24."""

    def __init__(self, argv: list[str], environ: dict[str, str]) -> None:
        self.side, inner = pty.openpty()
        termios.tcsetwinsize(inner, (24, 80))
        self.before = termios.tcgetattr(inner)
        self.seen = b""
        self.process = subprocess.Popen(
            argv, env=environ | {"TERM": "xterm-256color"}, stdin=inner, stdout=inner, stderr=inner, start_new_session=True
        )
        self.inner = inner

    def wait_for(self, text: str, timeout_s: float = 30.0) -> None:
        """Read on until `text` has come; what came before it is done with."""
        deadline = time.monotonic() + timeout_s
        while text.encode() not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} has not come: {self.seen[-4000:]!r}"
            if select.select([self.side], [], [], 0.1)[0]:
                self.seen += os.read(self.side, 65536)
        self.seen = self.seen.partition(text.encode())[2]

    def press(self, keys: bytes) -> None:
        os.write(self.side, keys)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        os.close(self.side)
        os.close(self.inner)


@pytest.fixture
def terminal(cluster: Cluster) -> Iterator[Terminal]:
    found = Terminal([*TOP, "--interval", "0.5"], cluster.environ)
    try:
        yield found
    finally:
        found.close()


def test_the_live_view_follows_the_cluster_obeys_keys_and_leaves_the_terminal_as_it_was(
    cluster: Cluster, terminal: Terminal
) -> None:
    terminal.wait_for("sort: name")
    task = cluster.client.submit("sleep", {"seconds": 300}, memory="48GiB")
    try:
        terminal.wait_for("48 GiB")
        terminal.press(b"s")
        terminal.wait_for("sort: fullest")
        terminal.press(b"p")
        terminal.wait_for("PAUSED")
    finally:
        task.cancel()
    terminal.press(b"p")
    terminal.wait_for("sort: fullest")
    terminal.press(b"q")
    assert terminal.process.wait(20) == 0
    assert termios.tcgetattr(terminal.inner) == terminal.before


def test_it_goes_on_through_a_loss_of_the_api(cluster: Cluster, terminal: Terminal) -> None:
    terminal.wait_for("all is well")
    api = cluster.role("api")
    api.suspend()
    try:
        terminal.wait_for("no answer for")
    finally:
        api.resume()
    terminal.wait_for("all is well")
    assert terminal.process.poll() is None
