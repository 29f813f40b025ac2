"""A real browser, driven over its DevTools websocket: Chromium without a window, in a profile of its own."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from servers import eventually
from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--force-color-profile=srgb", "--remote-debugging-port=0", "about:blank"),
)
START_SECONDS = 60
LARGEST = 64 << 20  # bytes of a message: a picture of the page
KEYS = {"ArrowRight": 39, "Enter": 13, "Escape": 27, "Tab": 9}


def chromium() -> str | None:
    """The program, or None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextlib.contextmanager
def browser(directory: Path) -> Iterator[Tab]:
    """A browser with one tab; it is gone afterwards."""
    program = chromium()
    assert program is not None
    log = (directory / "chromium.log").open("wb")
    with log:
        process = subprocess.Popen(
            [program, f"--user-data-dir={directory / 'profile'}", *FLAGS],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        port_file = directory / "profile" / "DevToolsActivePort"
        eventually(port_file.exists, START_SECONDS, "the browser is there")
        port = int(eventually(port_file.read_text, 5, "it says its port").split()[0])
        pages = httpx.get(f"http://127.0.0.1:{port}/json/list").json()
        page = next(page for page in pages if page["type"] == "page")
        with connect(page["webSocketDebuggerUrl"], max_size=LARGEST, ping_interval=None) as socket:
            yield Tab(socket)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Tab:
    """One page. What it complains about is in `complaints`."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command, and its answer."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            said = json.loads(self._socket.recv(timeout=60))
            if said.get("id") == number:
                assert "error" not in said, (method, said["error"])
                return dict(said["result"])
            self._hear(said)

    def _hear(self, said: dict[str, Any]) -> None:
        match said.get("method"):
            case "Runtime.exceptionThrown":
                details = said["params"]["exceptionDetails"]
                self.complaints.append(details.get("exception", {}).get("description") or details["text"])
            case "Runtime.consoleAPICalled" if said["params"]["type"] in ("error", "warning", "assert"):
                self.complaints.append(str([a.get("value") for a in said["params"]["args"]]))
            case "Log.entryAdded" if said["params"]["entry"]["level"] in ("error", "warning"):
                entry = said["params"]["entry"]
                self.complaints.append(f"{entry['text']} {entry.get('url', '')}")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page; what it promises is awaited."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, url: str) -> None:
        """Go there, and wait until it is loaded."""
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete'", 30)

    def until(self, expression: str, seconds: float) -> Any:
        """Wait until an expression of the page is true, and return it."""
        try:
            return eventually(lambda: self.evaluate(expression), seconds, expression)
        except AssertionError as late:
            raise AssertionError(f"{late}; {self.complaints}") from None

    def check_widths(self, *widths: int) -> None:
        """In light and in dark, each in colors of its own, nothing is wider than a window of these pixels."""
        colors = set()
        for scheme in ("light", "dark"):
            self.prefer(scheme)
            colors.add(self.evaluate("getComputedStyle(document.body).backgroundColor"))
            for width in widths:
                self.size(width, 900)
                wide = self.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, f"{wide} pixels in a window of {width}"
        assert len(colors) == 2

    def text(self, selector: str) -> str:
        """What the first such element says."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''"))

    def size(self, width: int, height: int, scale: float = 1.0, mobile: bool = False) -> None:
        """The size of the window in CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=mobile,
        )

    def prefer(self, scheme: str = "light", motion: str = "no-preference") -> None:
        """What the reader's system prefers: light or dark, and `reduce` for less motion."""
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        self.send("Emulation.setEmulatedMedia", features=features)

    def click(self, x: float, y: float) -> None:
        """A click with the mouse."""
        at = {"x": x, "y": y, "button": "left", "clickCount": 1}
        self.send("Input.dispatchMouseEvent", type="mousePressed", **at)
        self.send("Input.dispatchMouseEvent", type="mouseReleased", **at)

    def click_on(self, selector: str) -> None:
        """A click into the middle of an element."""
        x, y = self.evaluate(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)}); "
            "node.scrollIntoView({block: 'center'}); const r = node.getBoundingClientRect(); "
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self.click(x, y)

    def press(self, key: str) -> None:
        """One key of the keyboard."""
        words = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **words, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **words)

    def type(self, text: str) -> None:
        """Text, where the focus is."""
        self.send("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        """What it shows, as a PNG: the whole page, not the window alone."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        made = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(made["data"]))
