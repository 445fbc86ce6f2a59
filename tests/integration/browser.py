"""A headless Chromium for tests of pages, over its DevTools protocol: opens, asks, waits, and tells what the page did.

The methods block, and the protocol runs in a thread of its own: a test that runs a server in its own loop calls them by
``asyncio.to_thread``. Each browser has a profile of its own, which goes with it, as all its processes do.
"""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar

import pytest
from tornado.websocket import WebSocketClientConnection, websocket_connect

T = TypeVar("T")
PROGRAMS: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START_S: Final = 30.0
CALL_S: Final = 20.0
MESSAGE_BYTES_MAX: Final = 64 * 1024 * 1024
"""A screenshot comes as one message."""
SWITCHES: Final = (
    "--headless=new",
    "--no-sandbox",  # tests run as root in containers; the pages are our own
    "--remote-debugging-port=0",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # a container's /dev/shm may have 64 MiB
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-breakpad",
    "--disable-sync",
    "--disable-extensions",
    "--no-first-run",
    "--no-default-browser-check",
    "--mute-audio",
    "--hide-scrollbars",
)


class Message(NamedTuple):
    """What a page wrote to its console, or an error in it. `level`: log, info, warning, error, …"""

    level: str
    text: str


class BrowserError(AssertionError):
    """The page, or the browser, did not do what was asked."""


def chromium_or_skip() -> str:
    """Path of a Chromium. Without one the test is skipped, in CI it fails."""
    found = next((path for program in PROGRAMS if (path := shutil.which(program))), None)
    if found is None:
        reason = "needs chromium (on Debian: apt-get install chromium)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


class Browser:
    """One browser with one page; a context manager.

    Attributes:
        console: what the page has written to its console, and its errors, since the last `open`.
        requests: URLs that the page has asked for since the last `open`, WebSockets too; ``data:`` and ``blob:`` are not.
    """

    def __init__(self, *, width: int = 1280, height: int = 900) -> None:
        self.console: list[Message] = []
        self.requests: list[str] = []
        self._program = chromium_or_skip()
        self._profile = Path(tempfile.mkdtemp(prefix="browser-"))
        self._size = f"--window-size={width},{height}"
        self._process: subprocess.Popen[bytes] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="devtools", daemon=True)
        self._page: WebSocketClientConnection | None = None
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loaded = threading.Event()
        self._last_id = 0

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None) -> None:
        self.close()

    # --- what a test does ---------------------------------------------------------------------------------------

    def open(self, url: str, timeout_s: float = CALL_S) -> None:
        """Go to `url` and wait until it has loaded. What it draws later, `wait_for` waits for."""
        self._loaded.clear()
        self.console.clear()
        self.requests.clear()
        answer = self.call("Page.navigate", url=url)
        if "errorText" in answer:
            raise BrowserError(f"{url} does not open: {answer['errorText']}")
        if not self._loaded.wait(timeout_s):
            raise BrowserError(f"{url} has not loaded within {timeout_s} s\n{self.story()}")

    def evaluate(self, js: str) -> Any:
        """The value of an expression in the page, as JSON; True for an element. A promise is waited for."""
        expression = f"Promise.resolve({js}).then(value => value instanceof Node ? true : value)"
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True)
        if "exceptionDetails" in answer:
            raise BrowserError(f"{js}\n{_error_text(answer['exceptionDetails'])}\n{self.story()}")
        return answer["result"].get("value")

    def wait_for(self, js: str, timeout_s: float = CALL_S) -> Any:
        """The first true value of an expression in the page."""
        deadline = time.monotonic() + timeout_s
        while True:
            value = self.evaluate(js)
            if value:
                return value
            if time.monotonic() >= deadline:
                raise BrowserError(f"not within {timeout_s} s: {js} (last: {value!r})\n{self.story()}")
            time.sleep(0.05)  # the period of looking

    def click(self, selector: str) -> None:
        """Click the first element that `selector` finds."""
        found = self.evaluate(f"(e => e ? (e.click(), true) : false)(document.querySelector({json.dumps(selector)}))")
        if not found:
            raise BrowserError(f"the page has no {selector}\n{self.story()}")

    def fill(self, selector: str, text: str) -> None:
        """Write into an input as a person would: frameworks hear of it."""
        self.wait_for(f"(e => e && (e.focus(), e.select(), true))(document.querySelector({json.dumps(selector)}))")
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path, *, whole_page: bool = False) -> None:
        """Write a PNG of what is seen, or of the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole_page)
        path.write_bytes(base64.b64decode(answer["data"]))

    def errors(self) -> list[Message]:
        """Messages of the console that tell of an error."""
        return [message for message in self.console if message.level in {"error", "assert"}]

    def story(self) -> str:
        """What the page asked for and wrote, for the message of a failure."""
        lines = [f"asked {url}" for url in self.requests[-30:]]
        lines += [f"{message.level}: {message.text}" for message in self.console[-30:]]
        return "\n".join(lines)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol; its result."""
        return self._run(self._call(method, params))

    def close(self) -> None:
        """End the browser's processes and take its profile away."""
        if self._page is not None:
            self._loop.call_soon_threadsafe(self._page.close)
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # its group: renderers and helpers are its children's children
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
        self._loop.close()
        shutil.rmtree(self._profile, ignore_errors=True)

    # --- the protocol -------------------------------------------------------------------------------------------

    def _start(self) -> None:
        log = self._profile / "chromium.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [self._program, *SWITCHES, self._size, f"--user-data-dir={self._profile}", "about:blank"],
                env={**os.environ, "TMPDIR": str(self._profile)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._run(self._connect(self._page_address(log)))
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _page_address(self, log: Path) -> str:
        """The WebSocket of the page that the browser has opened."""
        assert self._process is not None
        deadline = time.monotonic() + START_S
        port_file = self._profile / "DevToolsActivePort"
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
                port = int(port_file.read_text().splitlines()[0])
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=5) as reply:
                    pages = json.load(reply)
                return str(next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page"))
            time.sleep(0.05)  # the period of looking
        raise BrowserError(f"{self._program} did not start:\n{log.read_text(errors='replace')[-2000:]}")

    async def _connect(self, address: str) -> None:
        self._page = await websocket_connect(
            address, on_message_callback=self._heard, max_message_size=MESSAGE_BYTES_MAX, connect_timeout=CALL_S
        )

    async def _call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        assert self._page is not None
        self._last_id += 1
        number = self._last_id
        answer: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._answers[number] = answer
        try:
            await self._page.write_message(json.dumps({"id": number, "method": method, "params": params}))
            async with asyncio.timeout(CALL_S):
                reply = await answer
        finally:
            del self._answers[number]
        if "error" in reply:
            raise BrowserError(f"{method}: {reply['error']['message']}")
        result = reply["result"]
        assert isinstance(result, dict)
        return result

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_S + 5)

    def _heard(self, text: str | bytes | None) -> None:
        """One message of the browser: an answer, or an event. None: it has gone."""
        if text is None:
            for pending in self._answers.values():
                if not pending.done():
                    pending.set_exception(BrowserError("the browser has gone"))
            return
        message = json.loads(text)
        params = message.get("params", {})
        match message.get("method"):
            case None:
                waiting = self._answers.get(message["id"])
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
            case "Page.loadEventFired":
                self._loaded.set()
            case "Runtime.consoleAPICalled":
                self.console.append(Message(params["type"], " ".join(_value_text(value) for value in params["args"])))
            case "Runtime.exceptionThrown":
                self.console.append(Message("error", _error_text(params["exceptionDetails"])))
            case "Log.entryAdded":
                entry = params["entry"]
                self.console.append(Message(entry["level"], f"{entry['text']} {entry.get('url', '')}".strip()))
            case "Network.requestWillBeSent":
                self._asked(params["request"]["url"])
            case "Network.webSocketCreated":
                self._asked(params["url"])
            case _:
                pass  # of no interest

    def _asked(self, url: str) -> None:
        if not url.startswith(("data:", "blob:")):
            self.requests.append(url)


def _value_text(value: dict[str, Any]) -> str:
    return str(value.get("value", value.get("description", value.get("type"))))


def _error_text(details: dict[str, Any]) -> str:
    return str(details.get("exception", {}).get("description") or details["text"])
