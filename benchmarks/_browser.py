"""A headless Chromium driven through a pipe: real mouse, real keys, media, pictures, and what it complains of.

Only the standard library: the DevTools protocol as JSON over two file descriptors (`--remote-debugging-pipe`), each
message ended by a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions", "--mute-audio"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--force-color-profile=srgb", "--remote-debugging-pipe"),
)
# Keys as the protocol wants them: code, virtual key, and the text that pressing types.
_KEYS = {
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "Tab": (9, ""),
    "ArrowRight": (39, ""),
    "ArrowLeft": (37, ""),
    "ArrowDown": (40, ""),
    " ": (32, " "),
}


def find() -> str | None:
    """Path of an installed Chromium; None without one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class BrowserError(Exception):
    """The browser did not do what it was asked for."""


class Browser:
    """One browser process with one page; a context manager.

    Args:
        program: path of Chromium (`find`).
        profile: an empty folder for its files.
        patience: seconds that one answer may take; a loaded machine is slow.
    """

    def __init__(self, program: str, profile: Path, patience: float = 120.0) -> None:
        self.patience = patience
        to_browser, self._writing = os.pipe()
        self._reading, from_browser = os.pipe()
        # The protocol wants descriptors 3 and 4. The shell opens them (by path: it copies only those below 10).
        line = f'exec "$0" "$@" 3</dev/fd/{to_browser} 4>/dev/fd/{from_browser}'
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", line, program, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": str(profile)},
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._last = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Performance"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._writing)
        os.close(self._reading)

    # ---- protocol

    def call(self, method: str, /, **parameters: Any) -> dict[str, Any]:
        """One command; its result.

        Raises:
            BrowserError: the browser refused it, ended, or did not answer in time.
        """
        self._last += 1
        sent = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None and not method.startswith("Target."):
            sent["sessionId"] = self._session
        os.write(self._writing, json.dumps(sent).encode() + b"\0")
        while True:
            received = self._receive(method)
            if received.get("id") == self._last:
                if "error" in received:
                    raise BrowserError(f"{method}: {received['error'].get('message')}")
                result: dict[str, Any] = received["result"]
                return result
            if "method" in received:
                self.events.append(received)

    def _receive(self, waiting_for: str) -> dict[str, Any]:
        limit = time.monotonic() + self.patience
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reading], [], [], max(0.0, limit - time.monotonic()))
            if not ready:
                raise BrowserError(f"{waiting_for}: no answer in {self.patience:.0f} s")
            piece = os.read(self._reading, 1 << 20)
            if not piece:
                raise BrowserError(f"{waiting_for}: the browser ended")
            self._buffer += piece
        text, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        return message

    def wait(self, until: Callable[[], bool], what: str) -> None:
        """Ask again until it is so.

        Raises:
            BrowserError: it never was.
        """
        limit = time.monotonic() + self.patience
        while not until():
            if time.monotonic() > limit:
                raise BrowserError(f"waited {self.patience:.0f} s for {what}")
            time.sleep(0.02)

    # ---- the page

    def open(self, page: Path) -> None:
        """Load a file, from the beginning, and wait until everything in it has been loaded and run."""
        self.events.clear()
        # Without this an equal address with another fragment would not load at all.
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=page.resolve().as_uri())
        address = json.dumps(page.resolve().as_uri())
        self.wait(lambda: self.value(f"location.href === {address} && document.readyState === 'complete'"), "the page")

    def value(self, expression: str) -> Any:
        """A JSON value of JavaScript in the page.

        Raises:
            BrowserError: it threw.
        """
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description") or details["text"])
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """What the console got since the page was opened: errors, warnings, exceptions, policy violations."""
        self.value("1")  # what was sent before this answer has arrived
        found = []
        for event in self.events:
            parameters = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                found.append(details.get("exception", {}).get("description") or details["text"])
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(" ".join(str(a.get("value", a.get("description"))) for a in parameters["args"]))
            elif event["method"] == "Log.entryAdded":
                found.append(parameters["entry"]["text"])
        return found

    def requests(self) -> list[str]:
        """Addresses that the page asked for since it was opened, itself included."""
        self.value("1")
        return [
            e["params"]["request"]["url"]
            for e in self.events
            if e["method"] == "Network.requestWillBeSent" and e["params"]["request"]["url"] != "about:blank"
        ]

    def middle(self, selector: str) -> tuple[float, float]:
        """Where the first match is in the window, scrolled into view.

        Raises:
            BrowserError: nothing matches, or it is not drawn.
        """
        place = self.value(
            f"(async () => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null;"
            "e.scrollIntoView({block: 'center', inline: 'center', behavior: 'instant'});"
            # Until the page has been told that it was scrolled.
            "for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame);"
            "const b = e.getBoundingClientRect();"
            "return [b.left + b.width / 2, b.top + b.height / 2, b.width + b.height]; })()"
        )
        if not place or not place[2]:
            raise BrowserError(f"{selector}: {'is not drawn' if place else 'no such element'}")
        return place[0], place[1]

    def hover(self, selector: str) -> None:
        """Move the mouse onto it."""
        x, y = self.middle(selector)
        self.move(x, y)

    def move(self, x: float, y: float) -> None:
        """Move the mouse to a place in the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        """Press and release the mouse on it."""
        x, y = self.middle(selector)
        self.move(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press and release a key, e.g. ``Tab``, ``Enter``, ``ArrowRight``."""
        code, text = _KEYS[key]
        common = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
        common["modifiers"] = 8 if shift else 0
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def write(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def media(self, kind: str = "", **features: str) -> None:
        """Show the page as on ``print``, or with preferences such as ``prefers_color_scheme="dark"``."""
        wanted = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", media=kind, features=wanted)

    def window(self, width: int, height: int = 900) -> None:
        """Size of the window in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def picture(self, file: Path, *, whole: bool = True) -> None:
        """A PNG of the page, or of what the window shows."""
        made = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._all(whole))
        file.write_bytes(base64.b64decode(made["data"]))

    def _all(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def pdf(self, file: Path) -> None:
        """The page as it is printed, sheet sizes by its own style."""
        made = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        file.write_bytes(base64.b64decode(made["data"]))
