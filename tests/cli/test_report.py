"""``logquant report``: pages made of what the other commands write, read as XML and in a real browser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from matplotlib import image

from logquant.cli.render import render
from tests.helpers.cli import run, succeed

pytestmark = pytest.mark.usefixtures("one_thread")

# What a row of results must show, and how many plots all rows get.
NUMBERS = {
    "eval": lambda row: [
        row["cache"],
        f"{row['kl']:.4f}",
        f"{row['greedy']['agreement']:.1f}",
        f"{row['passkey']['nll']:.2f}",
    ],
    "attend": lambda row: [f"{1e3 * timing['median']:.2f}" for timing in row["timings"].values()],
    "generate": lambda row: [
        row["cache"],
        f"{row['tokens_per_second']:.1f}",
        "{median:.2f} ({quartile1:.2f} to {quartile3:.2f})".format(**row["speedup"]),
    ],
    "plan": lambda row: [row["cache"], f"{row['batch']:,}"],
    "memory": lambda row: [row["cache"], f"{row['held'] / 1e6:,.1f}"],
}
PLOTS = {"eval": 2, "attend": 1, "generate": 1, "plan": 1, "memory": 1}


@pytest.fixture(scope="module")
def results(model_dir, tmp_path_factory) -> dict[str, Path]:
    """One small run of every command, by kind."""
    directory = tmp_path_factory.mktemp("results")
    texts = [directory / "a.txt", directory / "b.txt"]
    for i, text in enumerate(texts):
        text.write_text("".join(chr(33 + (7 * i + j * j) % 90) for j in range(400)))
    common = ("--model", model_dir, "--caches", "full,logquant:window=32")
    commands = {
        "eval": (
            *("eval", *texts, *common, "--prefill", 100, "--tokens", 60, "--chunk", 20),
            *("--tasks", "kl,greedy,passkey", "--passkey-tokens", 160, "--passkey-texts", 1),
        ),
        "attend": (
            "bench",
            "attend",
            "--dim",
            64,
            "--heads",
            4,
            "--kv-heads",
            2,
            "--context",
            "400,800",
            "--rounds",
            3,
        ),
        "generate": ("bench", "generate", *common, "--context", 300, "--batch", "1,2", "--steps", 3),
        "plan": ("plan", *common),
    }
    if sys.platform.startswith("linux"):
        memory = ("--model", model_dir, "--cache", "full,logquant:window=32", "--context", 300)
        commands["memory"] = ("bench", "memory", *memory)
    files = {kind: directory / f"{kind}.json" for kind in commands}
    for kind, command in commands.items():
        succeed(*command, "--json", files[kind])
    return files


@pytest.fixture(scope="module")
def page(results, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    output = succeed("report", *results.values(), "--output", path).output
    assert f"{len(results)} results" in output
    return path


def test_pages_hold_every_number_and_need_nothing_else(results, page):
    text = page.read_text()
    root = ET.fromstring(re.sub(r"<!doctype html>|<meta charset[^>]*>", "", text))
    sections = root.findall(".//section")
    assert len(sections) == len(results)
    for section, (kind, file) in zip(sections, results.items(), strict=True):
        written = json.loads(file.read_text())
        assert written["kind"] == kind and section.find("pre").text == written["command"]
        assert len(section.findall(".//figure")) == PLOTS[kind]
        cells = {"".join(cell.itertext()) for cell in section.iter("td")}
        assert {text for row in written["results"] for text in NUMBERS[kind](row)} <= cells
    # Nothing is loaded from elsewhere: addresses only name XML's vocabularies.
    assert not re.findall(r"<(?:script|link|img|iframe|object)\b|@import|url\((?!#)", text)


def test_the_same_results_give_the_same_page(results, page):
    assert render(list(results.values())) == page.read_text()


def test_names_in_results_are_not_markup(results, tmp_path):
    content = json.loads(results["plan"].read_text())
    content["command"] = content["results"][0]["cache"] = "<script>alert(1)</script>"
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(content))
    text = render([file])
    assert "<script>" not in text and html.escape("<script>alert(1)") in text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kind": "poem", "results": []}', '{"kind": "eval"}', "\udcff"])
def test_other_files_are_refused(tmp_path, content):
    file = tmp_path / "other.json"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    result = run("report", file, "--output", tmp_path / "page.html")
    assert result.exit_code == 2 and not (tmp_path / "page.html").exists()
    with pytest.raises(ValueError, match=r"other\.json must be results that logquant's --json has written"):
        render([file])


def chromium() -> str:
    found = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if found is None:
        pytest.skip("needs Chromium: CHROMIUM, or one of chromium, chromium-browser and google-chrome in PATH")
    return found


def test_a_browser_shows_every_plot(results, page, tmp_path):
    """Where the browser says the plots are, its screenshot has them."""
    measured = tmp_path / "measured.html"
    script = """<script>document.title = JSON.stringify([...document.querySelectorAll("figure svg")].map(svg => {
      const box = svg.getBoundingClientRect();
      return [box.left + scrollX, box.top + scrollY, box.width, box.height, svg.querySelectorAll("text").length];
    }))</script></body>"""
    measured.write_text(page.read_text().replace("</body>", script))
    width, height = 1100, 6000
    browser = [
        *(chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"),
        *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},{height}"),
    ]
    dump = subprocess.run(
        [*browser, "--dump-dom", measured.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    boxes = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dump.stdout)[1]))
    assert len(boxes) == sum(PLOTS[kind] for kind in results)
    shot = tmp_path / "shot.png"
    subprocess.run([*browser, f"--screenshot={shot}", page.as_uri()], capture_output=True, timeout=120, check=True)
    pixels = image.imread(shot)[..., :3]
    for left, top, wide, high, words in boxes:
        assert wide > 400 and high > 80 and words > 5
        part = pixels[int(top) : int(top + high), int(left) : int(left + wide)]
        assert part.shape[:2] == (int(top + high) - int(top), int(left + wide) - int(left)), "within the screenshot"
        colourful = (part.max(-1) - part.min(-1) > 0.2).mean()
        dark = (part.max(-1) < 0.4).mean()
        assert colourful > 5e-4 and dark > 1e-3, "data in colours, words and axes in black"
