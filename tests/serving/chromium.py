"""A real browser without further packages: Chromium's DevTools protocol over a pair of pipes."""

from __future__ import annotations

import base64
import itertools
import json
import os
import selectors
import shutil
import time
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --mute-audio "
    "--disable-background-networking --disable-component-update --hide-scrollbars"
).split()


class Chromium:
    """One headless browser with one tab.

    Attributes:
      events: what the tab has told since the start: (method, params).
    """

    def __init__(self, profile: Path) -> None:
        assert PROGRAM is not None
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        arguments = [PROGRAM, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        places = [(os.POSIX_SPAWN_DUP2, theirs_in, 3), (os.POSIX_SPAWN_DUP2, theirs_out, 4)]
        quiet = [(os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
        self._pid = os.posix_spawn(
            PROGRAM, arguments, os.environ, file_actions=[*places, *quiet], setpgroup=0
        )
        os.close(theirs_in), os.close(theirs_out)
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._in, selectors.EVENT_READ)
        self._bytes, self._ids, self._session = b"", itertools.count(1), None
        self.events: list[tuple[str, dict[str, Any]]] = []
        tab = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=tab, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self._session = None
        try:
            self.send("Browser.close")
        except (OSError, TimeoutError):
            pass
        os.waitpid(self._pid, 0)
        os.close(self._in), os.close(self._out)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        id = next(self._ids)
        message: dict[str, Any] = {"id": id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 60
        while True:
            answer = self._receive(end - time.monotonic())
            if answer.get("id") == id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _receive(self, seconds: float) -> dict[str, Any]:
        while b"\0" not in self._bytes:
            if not self._ready.select(max(0, seconds)):
                raise TimeoutError("Chromium does not answer")
            if not (new := os.read(self._in, 1 << 16)):
                raise ConnectionError("Chromium has ended")
            self._bytes += new
        first, _, self._bytes = self._bytes.partition(b"\0")
        message = json.loads(first)
        if "method" in message:
            self.events.append((message["method"], message.get("params", {})))
        return message

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def evaluate(self, code: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        result = self.send(
            "Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(f"{code}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def until(self, code: str, seconds: float = 120) -> Any:
        """Waits until an expression is true, and returns its value."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(code)):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"never true: {code}\n{self.evaluate('document.body.innerText')}"
                )
            time.sleep(0.05)
        return value

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        code = {"Enter": 13, "Escape": 27, "Tab": 9}[key]
        keys: dict[str, Any] = dict(key=key, code=key, windowsVirtualKeyCode=code)
        keys |= dict(modifiers=8 * shift, text="\r" if key == "Enter" else "")
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, **keys)

    def window(self, width: int, height: int, dark: bool = False) -> None:
        """The size of the page in pixels, and what the user prefers."""
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
