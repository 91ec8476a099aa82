"""Drives Debian's Chromium without a screen, over the Chrome DevTools Protocol. No assertions live here.

The protocol is spoken over a pair of pipes (`--remote-debugging-pipe`): messages are JSON, each ended by a zero byte.
So no port is opened that others on the machine could use, and the browser ends when this process does.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ANSWER_SECONDS = 60.0
_STOP_SECONDS = 10.0
_EXECUTABLE = "/usr/lib/chromium/chromium"  # what /usr/bin/chromium, a shell script, starts
_FLAGS = (
    "--headless",
    "--no-sandbox",  # as root there is none
    "--remote-debugging-pipe",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-breakpad",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-sync",
    "--metrics-recording-only",
    "--mute-audio",
    "--no-default-browser-check",
    "--no-first-run",
    "--no-proxy-server",
    "--password-store=basic",
    # A name other than the loopback's leads nowhere: what a page tries to fetch from elsewhere fails, and is seen.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class PageError(Exception):
    """The browser refused a command, a script failed, or something waited for did not come."""


@dataclass(slots=True)
class Exchange:
    """A request of the page and what became of it. `status` is None without an answer; `failure` says what went wrong
    before or after it. An answer that the page itself stopped reading, because it had what it wanted, is no failure.
    """

    method: str
    url: str
    headers: Mapping[str, str]
    status: int | None = None
    failure: str | None = None
    is_open: bool = True


@dataclass
class Page:
    """One page of a browser. What it requested and what it said on its console is collected."""

    browser: Browser
    target: str
    session: str
    exchanges: dict[str, Exchange] = field(default_factory=dict)
    console: list[str] = field(default_factory=list)

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.command(method, self.session, **parameters)

    def open(self, url: str) -> None:
        answer = self.command("Page.navigate", url=url)
        if "errorText" in answer:
            raise PageError(f"{url}: {answer['errorText']}")

    def close(self) -> None:
        self.browser.command("Target.closeTarget", targetId=self.target)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON has it; a promise is waited for."""
        answer = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise PageError(str(answer["exceptionDetails"].get("exception", answer["exceptionDetails"])))
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 30.0) -> None:
        """Return once an expression is true. Raises PageError with what the page shows when it does not become so."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.evaluate(f"Boolean({expression})"):
                return
            time.sleep(0.1)
        shown = self.evaluate("document.body ? document.body.innerText : ''")
        raise PageError(f"not within {seconds} s: {expression}\nconsole: {self.console[-10:]}\nthe page shows: {shown}")

    def wait_until_quiet(self, seconds: float = 30.0) -> None:
        """Return once no request has been open, and none has begun, for a second."""
        deadline = time.monotonic() + seconds
        quiet_since, known = time.monotonic(), -1
        while time.monotonic() < deadline:
            self.evaluate("0")  # its answer comes after the events before it
            if any(each.is_open for each in list(self.exchanges.values())) or len(self.exchanges) != known:
                quiet_since, known = time.monotonic(), len(self.exchanges)
            elif time.monotonic() - quiet_since > 1:
                return
            time.sleep(0.1)
        raise PageError(f"requests were still open after {seconds} s")

    def click(self, expression: str, count: int = 1) -> None:
        """Click with the mouse into the middle of the element that an expression gives."""
        x, y = self._middle(expression)
        for number in range(1, count + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=number)

    def turn_wheel(self, expression: str, pixels: int) -> None:
        """Turn the mouse's wheel over the middle of the element that an expression gives."""
        x, y = self._middle(expression)
        self.command("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=pixels)

    def screenshot(self) -> bytes:
        """A PNG of what is seen."""
        return base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"])

    def _middle(self, expression: str) -> tuple[float, float]:
        x, y = self.evaluate(
            f"(() => {{ const box = ({expression}).getBoundingClientRect(); "
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        return x, y

    def notice(self, method: str, parameters: Mapping[str, Any]) -> None:
        """An event of the page."""
        exchange = self.exchanges.get(str(parameters.get("requestId")))
        match method:
            case "Network.requestWillBeSent":
                request = parameters["request"]
                if not request["url"].startswith(("data:", "blob:")):
                    self.exchanges[parameters["requestId"]] = Exchange(
                        request["method"], request["url"], request["headers"]
                    )
            case "Network.responseReceived" if exchange is not None:
                exchange.status = parameters["response"]["status"]
            case "Network.loadingFinished" if exchange is not None:
                exchange.is_open = False
            case "Network.loadingFailed" if exchange is not None:
                exchange.is_open = False
                if exchange.status is None or not parameters.get("canceled"):
                    exchange.failure = parameters.get("blockedReason") or parameters["errorText"]
            case "Runtime.consoleAPICalled":
                texts = [str(each.get("value", each.get("description", ""))) for each in parameters["args"]]
                self.console.append(f"{parameters['type']}: {' '.join(texts)}")
            case "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                self.console.append(f"exception: {details.get('exception', {}).get('description', details['text'])}")
            case "Log.entryAdded":
                self.console.append(f"{parameters['entry']['level']}: {parameters['entry']['text']}")


class Browser:
    """A running Chromium."""

    def __init__(self, process: subprocess.Popen[bytes], to_browser: int, from_browser: int) -> None:
        self.process = process
        self._to_browser = to_browser
        self._from_browser = from_browser
        self._numbers = itertools.count(1)
        self._sending = threading.Lock()
        self._waiting: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}
        self._reader = threading.Thread(target=self._read, name="chromium", daemon=True)
        self._reader.start()

    def command(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The answer to a command. Raises PageError when it is refused, or when there is none in time."""
        number = next(self._numbers)
        answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._waiting[number] = answers
        message = {"id": number, "method": method, "params": parameters}
        self._send(message if session is None else {**message, "sessionId": session})
        try:
            answer = answers.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            raise PageError(f"no answer to {method} within {ANSWER_SECONDS} s") from None
        finally:
            del self._waiting[number]
        if "error" in answer:
            raise PageError(f"{method}: {answer['error'].get('message')}")
        return dict(answer["result"])

    def new_page(self, width: int = 1280, height: int = 900) -> Page:
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, target, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.command(f"{domain}.enable")
        page.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        # Workers fetch too; theirs are the same page's requests.
        page.command("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=True, flatten=True)
        return page

    def close(self) -> None:
        """Ask the browser to end, and end its processes when it does not."""
        with contextlib.suppress(PageError, OSError):
            self._send({"id": next(self._numbers), "method": "Browser.close", "params": {}})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_SECONDS)
        deadline = time.monotonic() + _STOP_SECONDS
        with contextlib.suppress(ProcessLookupError):  # there is nobody left
            while time.monotonic() < deadline:
                os.killpg(self.process.pid, signal.SIGKILL)  # a group of its own: the browser and its helpers
                time.sleep(0.05)
                self.process.poll()
        os.close(self._to_browser)
        self._reader.join(_STOP_SECONDS)
        os.close(self._from_browser)

    def _send(self, message: Mapping[str, Any]) -> None:
        content = json.dumps(message).encode() + b"\0"
        with self._sending:
            while content:
                content = content[os.write(self._to_browser, content) :]

    def _read(self) -> None:
        rest = b""
        while block := os.read(self._from_browser, 1 << 16):
            *messages, rest = (rest + block).split(b"\0")
            for message in messages:
                self._take(json.loads(message))
        for waiting in list(self._waiting.values()):
            waiting.put({"error": {"message": "the browser ended"}})

    def _take(self, message: dict[str, Any]) -> None:
        waiting = self._waiting.get(message.get("id", 0))
        if waiting is not None:
            waiting.put(message)
            return
        page = self._pages.get(message.get("sessionId", ""))
        if page is None or "method" not in message:
            return
        parameters = message["params"]
        if message["method"] == "Target.attachedToTarget":
            worker = parameters["sessionId"]
            self._pages[worker] = page
            for method in ("Network.enable", "Runtime.enable", "Runtime.runIfWaitingForDebugger"):
                self._send({"id": next(self._numbers), "method": method, "params": {}, "sessionId": worker})
        page.notice(message["method"], parameters)


@contextmanager
def running_chromium() -> Iterator[Browser]:
    """A browser with a new profile, ended and forgotten with the block. Raises FileNotFoundError without Chromium."""
    executable = _EXECUTABLE if os.path.exists(_EXECUTABLE) else shutil.which("chromium")
    if executable is None:
        raise FileNotFoundError("chromium is not installed; run `make test-clients`, which installs it")
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        browser = _start(executable, Path(profile))
        try:
            yield browser
        finally:
            browser.close()


def _start(executable: str, profile: Path) -> Browser:
    commands, to_browser = os.pipe()
    from_browser, events = os.pipe()
    # The browser reads commands from its descriptor 3 and writes to 4; a shell puts them there, before it becomes it.
    script = f'exec "$@" 3<&{commands} 4>&{events}'
    with (profile / "log").open("wb") as log:
        process = subprocess.Popen(
            ["/bin/bash", "-c", script, "bash", executable, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(commands, events),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "HOME": str(profile), "LANG": "en_US.UTF-8", "TZ": "UTC"},
        )
    os.close(commands)
    os.close(events)
    return Browser(process, to_browser, from_browser)
