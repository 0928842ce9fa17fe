"""The report in headless Chromium: no errors, videos play, nothing overflows a phone or a sheet of paper.

Runs where Chromium is installed (Debian: `chromium-headless-shell`), or CHROMIUM says where it is.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import closed, offline

from worldmodel.report import write_report

NAMES = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

PLAY = """(async () => {
  const clips = [...document.querySelectorAll("video")];
  document.querySelectorAll("details").forEach(d => { d.open = true; });
  let played = 0;
  for (const clip of clips) { clip.muted = true; await clip.play(); played += clip.videoWidth > 0; }
  clips[0].scrollIntoView();
  return [clips.length, played];
})()"""
RUNS = """new Promise((resolve, reject) => {  // those that are off the screen are paused
  document.querySelector("video").addEventListener("timeupdate", resolve);
  setTimeout(() => reject(new Error("the first clip does not play")), 20000);
})"""
OVER = """[...document.querySelectorAll("body *")].filter(e =>
  e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(EXEMPT)).map(e => e.tagName + "." + e.className)"""


class Browser:
    """One tab, driven over the DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.numbers = socket, itertools.count(1)
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command; events that come before it are kept."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def ask(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def resize(self, width: int, height: int, mobile: bool) -> None:
        """A screen of another size."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    from websockets.sync.client import connect

    folder = tmp_path_factory.mktemp("chromium")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--user-data-dir={folder}", "about:blank"], stdout=log, stderr=log)
    try:
        with connect(_tab(folder, process), max_size=None) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait(30)


def _tab(folder: Path, process: subprocess.Popen) -> str:
    """Address of the first tab, once the browser listens."""
    from urllib.request import urlopen

    for _ in range(300):
        listening = re.search(r"ws://(\S+?)/", (folder / "log").read_text(errors="replace"))
        if listening:
            with urlopen(f"http://{listening[1]}/json") as answer:
                if pages := [tab for tab in json.load(answer) if tab["type"] == "page"]:
                    return pages[0]["webSocketDebuggerUrl"]
        assert process.poll() is None, (folder / "log").read_text(errors="replace")
        time.sleep(0.1)
    raise AssertionError("Chromium does not listen")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section that a plain evaluation has."""
    split = offline("heldout_tasks", ["door-v3", "a-task-with-a-name-that-is-rather-long-v3"], 2)
    lost = {
        f["name"]: f["ours"] | {"difference": f["ours"], "better": False, "clearly": True} for f in split["figures"]
    }
    missing = {**{key: split[key] for key in ("split", "clips", "episodes")}, "complete": split["figures"],
               "rows": [{"missing": "3D points and trajectories", "figures": lost}]}  # fmt: skip
    stamp = {"data": "/a/folder/" + "with_a_long_name" * 6, "versions": {"torch": "2"}, "config": {"seed": 0}}
    results = {"title": "run", "stamp": stamp, "offline": [split], "closed_loop": [closed("ours", 19)]}
    return write_report(results | {"missing": [missing]}, tmp_path_factory.mktemp("report"))[1]


def test_report_in_a_browser(browser: Browser, page: Path) -> None:
    browser.resize(1280, 900, False)
    browser.call("Page.navigate", url=page.as_uri())
    while browser.ask("document.readyState") != "complete":
        time.sleep(0.1)
    count, played = browser.ask(PLAY)
    assert count == played > 8
    browser.ask(RUNS)
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    faults = [
        event
        for event in browser.events
        if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")
        or (event["method"] == "Runtime.consoleAPICalled" and event["params"]["type"] in ("error", "warning"))
    ]
    assert faults == []

    browser.resize(390, 844, True)
    assert browser.ask("document.documentElement.scrollWidth") <= 390
    assert browser.ask(OVER.replace("EXEMPT", "'.wide, nav, pre, svg'")) == []

    browser.call("Emulation.setEmulatedMedia", media="print")
    browser.resize(720, 1000, False)  # A4 with the usual margins
    assert browser.ask(OVER.replace("EXEMPT", "'nav, svg'")) == []
    browser.call("Emulation.setEmulatedMedia", media="")
    assert len(browser.call("Page.printToPDF")["data"]) > 10_000
