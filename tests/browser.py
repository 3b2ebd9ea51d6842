"""A headless Chromium driven over its DevTools protocol, by pipe: no driver, no socket, no port."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"),
    *("--hide-scrollbars", "--no-first-run", "--disable-extensions", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--mute-audio"),
)
# The browser's own numbers for what it reads and writes are 3 and 4.
_START = "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); "
_START += "os.execv(sys.argv[3], sys.argv[3:])"


def path() -> str | None:
    """Where a browser is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A tab of the browser."""

    def __init__(self, process: subprocess.Popen, read: Any, write: Any):
        self._process, self._read, self._write = process, read, write
        self._numbers, self._session = itertools.count(1), None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> dict:
        number = self.send(method, **parameters)
        return self.wait(lambda message: message.get("id") == number).get("result", {})

    def send(self, method: str, **parameters: Any) -> int:
        message = {"id": next(self._numbers), "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        return message["id"]

    def wait(self, wanted: Any) -> dict:
        while True:
            raw = bytearray()
            while (byte := self._read.read(1)) != b"\0":
                if not byte:
                    raise RuntimeError("the browser has ended")
                raw += byte
            message = json.loads(raw)
            if "error" in message:
                raise RuntimeError(f"{message['error']}")
            if wanted(message):
                return message

    def look(self, width: int, dark: bool, height: int = 900) -> None:
        """The screen's CSS pixels, a phone's too, which a window is too wide for; its colours."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.wait(lambda message: message.get("method") == "Page.loadEventFired")

    def ask(self, script: str) -> Any:
        """The value of an expression in JavaScript, promises awaited."""
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"])[:2000])
        return result["result"].get("value")

    def screenshot(self) -> bytes:
        """All of the page as PNG, in base64."""
        return self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]


@contextlib.contextmanager
def started(profile: Any) -> Iterator[Page]:
    """A tab of a browser of its own, which ends with the block; `profile` is an empty folder."""
    theirs, write = os.pipe()
    read, theirs_too = os.pipe()
    start = [sys.executable, "-S", "-c", _START, str(theirs), str(theirs_too), path(), *_FLAGS]
    process = subprocess.Popen(
        [*start, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(theirs, theirs_too),
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    os.close(theirs_too)
    try:
        with os.fdopen(read, "rb") as reader, os.fdopen(write, "wb") as writer:
            yield Page(process, reader, writer)
    finally:
        process.terminate()
        process.wait()
