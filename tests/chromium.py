"""A page in a headless browser, driven over a pipe: what it logs, what it fetches, how it looks."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

BINARY = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One tab. Commands wait for their answer; events that come meanwhile are kept."""

    def __init__(self, to: int, back: int) -> None:
        self.to, self.back, self.number, self.rest = to, back, 0, b""
        self.events: list[dict[str, Any]] = []
        self.session = ""
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **given: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": given} | ({"sessionId": self.session} if self.session else {})
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            found = os.read(self.back, 1 << 20)
            assert found, "the browser has ended"
            self.rest += found
        first, _, self.rest = self.rest.partition(b"\0")
        return json.loads(first)

    def ask(self, expression: str) -> Any:
        return self.do("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def show(self, page: Path, width: int, dark: bool, seconds: float = 120) -> None:
        """Opens a page, and waits until each chart that has room is drawn."""
        self.events.clear()
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600)
        self.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.do("Page.navigate", url=page.as_uri())
        until = time.monotonic() + seconds
        waiting = "document.readyState != 'complete' || [...document.querySelectorAll('.chart')].some(c => !c.closest('details:not([open])') && !c.dataset.drawn)"
        while self.ask(waiting):
            assert time.monotonic() < until, self.problems() or "charts are not drawn"
            time.sleep(0.2)

    def problems(self) -> list[str]:
        """What the page has logged as an error, and what it has asked the network for."""
        found = []
        for event in self.events:
            given = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(json.dumps(given["exceptionDetails"])[:500])
            elif event.get("method") == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(given["args"])[:500])
            elif event.get("method") == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
                found.append(given["entry"]["text"])
            elif event.get("method") == "Network.requestWillBeSent":
                url = given["request"]["url"]
                found += [] if url.startswith(("file:", "data:", "blob:", "about:")) else [f"asks for {url}"]
        return found

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        size = self.do("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 12_000), "scale": 1}
        path.write_bytes(base64.b64decode(self.do("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]))


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with an empty profile, which ends with the context."""
    assert BINARY is not None
    (theirs_in, to), (back, theirs_out) = os.pipe(), os.pipe()
    with TemporaryDirectory(prefix="chromium-") as profile:
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
        ]
        script = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = ["bash", "-c", script, BINARY, *flags, "about:blank"]
        running = subprocess.Popen(
            command, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Browser(to, back)
        finally:
            os.close(to)
            os.close(back)
            running.kill()
            running.wait()
            time.sleep(0.3)
