"""The page in headless Chromium: every figure loads, nothing is blocked, its script works."""

import html
import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest

from kdcmae_fast.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")

# What a person does: moves over a chart, goes on by keys, hides a run, enlarges a picture.
PERSON = """
addEventListener("load", () => {
  const said = [], chart = document.querySelector(".chart");
  const drawing = chart.querySelector(".drawing");
  const box = drawing.getBoundingClientRect();
  drawing.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2}));
  const readout = chart.querySelector(".readout");
  said.push(readout.innerText.replaceAll("\\n", " "));
  chart.querySelector(".plot").dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
  said.push(readout.innerText.split("\\n")[0]);
  document.querySelector(".legend li:nth-child(2) button").click();
  const line = document.querySelector('#curves path.line[data-place="1"]');
  said.push(`second: ${line.style.display}`);
  drawing.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2}));
  said.push(readout.innerText.includes("second"));
  document.querySelector(".enlarge").click();
  said.push(document.querySelector("dialog").open);
  said.push(document.documentElement.scrollWidth <= innerWidth);
  document.documentElement.dataset.said = said.join(" | ");
});
"""

# What names of 200 letters and many runs may not do: widen the page, or fill it.
SIZES = """
addEventListener("load", () => {
  const size = (what) => document.querySelector(what).getBoundingClientRect();
  const drawing = document.querySelector(".drawing"), box = size(".drawing");
  drawing.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2}));
  const table = document.querySelector(".compared");
  table.scrollLeft = 9999;
  const matrix = document.querySelector("img.matrix");
  document.documentElement.dataset.said = [
    document.documentElement.scrollWidth <= innerWidth,
    size("header").height < 400,
    size(".confusion").height < 500,
    document.querySelector(".readout").childNodes.length,
    size(".readout").width < 500,
    table.scrollLeft > 99 && size(".compared tbody th[scope=row]").left >= size(".compared").left,
    matrix.width / matrix.naturalWidth,
  ].join(" | ");
});
"""


def browse(page: Path, width: int, *options: str) -> dict[str, Any]:
    """Open a page from the file system; the `data-` attributes that its scripts left, and what
    the browser's console says."""
    command = [
        str(BROWSER), "--headless=new", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--hide-scrollbars", f"--window-size={width},2000",
        "--virtual-time-budget=3000", f"--user-data-dir={page.parent / 'browser'}", *options,
    ]  # fmt: skip
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--no-sandbox")  # Chromium's own condition for the superuser
    command += ["--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    start = re.search(r"<html[^>]*>", done.stdout).group()
    found = re.findall(r'data-([a-z]+)="([^"]*)"', start)
    console = re.findall(r"CONSOLE:\d+\] (.*)", done.stderr)
    return {name: html.unescape(value) for name, value in found} | {"console": console}


def pixels(path: Path) -> tuple[int, int, set[bytes]]:
    """Width, height and the colours of the lines of an RGB or RGBA PNG, before their filters."""
    body = path.read_bytes()
    width, height = struct.unpack(">II", body[16:24])
    packed, place = b"", 8
    while place < len(body):
        (length,) = struct.unpack(">I", body[place : place + 4])
        if body[place + 4 : place + 8] == b"IDAT":
            packed += body[place + 8 : place + 8 + length]
        place += 12 + length
    lines = zlib.decompress(packed)
    size = len(lines) // height
    return width, height, {lines[row * size : (row + 1) * size] for row in range(height)}


def test_one_run(make_run, tmp_path):
    page = write_report([make_run()], tmp_path / "report.html")
    shown = browse(page, 1280, f"--screenshot={tmp_path / 'page.png'}")
    assert shown == {"figures": "25 of 25 loaded, 0 failed", "errors": "", "console": []}
    width, height, lines = pixels(tmp_path / "page.png")
    assert (width, height) == (1280, 2000)
    assert len(lines) > 300  # something is drawn on most of it


def test_two_runs_with_linked_files(make_run, tmp_path):
    runs = [make_run(), make_run("second #2 <b>&amp;")]
    page = write_report(runs, tmp_path / "report.html", max_megabytes=0.001)
    (runs[0] / "inpainting" / "rebuilt.wav").unlink()  # after the page was written
    body = page.read_text(encoding="utf-8")  # a tag that got past us; the page's policy bars it
    page.write_text(body.replace("<footer>", "<footer><script>throw Error('run')</script>", 1))
    shown = browse(page, 1280, f"--screenshot={tmp_path / 'page.png'}")
    assert shown["figures"] == "49 of 50 loaded, 1 failed"
    # The page hears of it too if the browser says so before the page looks.
    assert shown["errors"] in ("", "script-src-elem: inline")
    (barred,) = shown["console"]
    assert "inline script violates" in barred
    assert len(pixels(tmp_path / "page.png")[2]) > 300


def with_script(page: Path, script: str) -> None:
    """Put a script at the end of a page, and take away the policy that bars it."""
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    body, removed = policy.subn("", page.read_text(encoding="utf-8"))
    assert removed == 1
    body = body.replace("</body>", f"<script>{script}</script></body>")
    page.write_text(body, encoding="utf-8")


def test_long_names_and_many_runs(make_run, tmp_path):
    """On a page for a desk and on one for a phone."""
    runs = [make_run("L" * 200), *(make_run(f"run {place}") for place in range(2, 20))]
    probe = runs[0] / "probe" / "metrics.json"
    metrics = json.loads(probe.read_text())
    names = ["L" * 200, "</script><b>", "rain"]
    probe.write_text(json.dumps({**metrics, "class_names": names, "tested_on": "L" * 200}))
    probe = runs[1] / "probe" / "metrics.json"
    large = {"confusion": [[int(row == col) for col in range(50)] for row in range(50)]}
    probe.write_text(json.dumps({**metrics, **large, "class_names": None}))
    page = write_report(runs, tmp_path / "report.html")
    with_script(page, SIZES)
    step, twelve, more = 1, 12, 1
    for width, zoom in ((1280, 580 // 50 + 1), (500, None)):
        shown = browse(page, width)
        assert shown["errors"] == "" and shown["console"] == []
        *fits, enlarged = shown["said"].split(" | ")
        assert fits == ["true"] * 3 + [str(step + twelve + more)] + ["true"] * 2
        assert zoom is None or float(enlarged) == zoom


def test_what_a_person_does(make_run, tmp_path):
    page = write_report([make_run(), make_run("second")], tmp_path / "report.html")
    with_script(page, PERSON)
    shown = browse(page, 500)
    assert shown["figures"] == "50 of 50 loaded, 0 failed"
    assert shown["errors"] == "" and shown["console"] == []
    first, moved, second, still, enlarged, fits = shown["said"].split(" | ")
    assert re.fullmatch(r"step 1[45]\d first \d\.\d+ second \d\.\d+", " ".join(first.split()))
    assert int(moved.removeprefix("step ")) > int(first.split()[1])
    assert (second, still, enlarged, fits) == ("second: none", "false", "true", "true")
