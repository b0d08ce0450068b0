"""``logquant report``: pages made of what the other commands write, read as XML and in a real browser."""

from __future__ import annotations

import html
import itertools
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

from logquant.cli.render import _colours, _spread, render
from tests.helpers.cli import run, succeed

pytestmark = pytest.mark.usefixtures("one_thread")

# What a row of results must show, and how many plots all rows get.
NUMBERS = {
    "eval": lambda row: [
        row["cache"],
        f"{row['kl']:.4f}",
        f"{row['kl_p999']:.4f}",
        f"{row['kl_above_1']:.2%}",
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
        memory = ("--model", model_dir, "--cache", "logquant:window=32", "--context", 300)
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


def sections_of(text: str) -> list[ET.Element]:
    return ET.fromstring(re.sub(r"<!doctype html>|<meta charset[^>]*>", "", text)).findall(".//section")


def test_pages_hold_every_number_and_need_nothing_else(results, page):
    text = page.read_text()
    sections = sections_of(text)
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


def test_sections_have_titles_of_their_own(results, tmp_path):
    """Told apart by the files' names, by as much of their folders as that takes, by a number for the same one again."""
    files = [tmp_path / name for name in ("a/x.json", "b/x.json", "y.json")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        shutil.copy(results["plan"], file)
    titles = [section.find("h2").text for section in sections_of(render([*files, results["attend"], files[2]]))]
    names = ["a/x", "b/x", "y (1)", "attend", "y (2)"]
    kinds = ["What fits"] * 3 + ["Attention of one token", "What fits"]
    assert titles == [f"{kind}: {name}" for kind, name in zip(kinds, names, strict=True)]


def test_kl_along_texts_is_drawn_where_there_are_several_spans(results, tmp_path):
    content, plots = json.loads(results["eval"].read_text()), []
    for spans in (1, 2, 3):
        for row in content["results"]:
            row["kl_along"] = {"tokens": 256, "kl": [0.001 * (i + 1) for i in range(spans)]}
        file = tmp_path / f"{spans}.json"
        file.write_text(json.dumps(content))
        (section,) = sections_of(render([file]))
        plots.append(len(section.findall(".//figure")))
    assert plots == [2, 3, 3]


@pytest.mark.parametrize("count", [1, 10, 13, 20, 21, 60])
def test_no_colour_comes_twice(count):
    assert len(set(_colours(count))) == count


def test_older_results_have_no_tail_of_kl(results, tmp_path):
    content = json.loads(results["eval"].read_text())
    for row in content["results"]:
        del row["kl_p99"], row["kl_p999"], row["kl_above_1"]
    file = tmp_path / "old.json"
    file.write_text(json.dumps(content))
    text = render([file])
    assert "p99" not in text and f"{content['results'][1]['kl']:.4f}" in text


@pytest.mark.parametrize("heights", [[], [0.5], [0.5] * 5, [0.0, 0.01, 0.02], [0.9, 0.95, 1.0, 1.0], [0.1, 0.5, 0.9]])
def test_labels_are_moved_until_they_are_apart(heights):
    gap = 0.1
    places = _spread(heights, gap)
    assert all(above - below >= gap - 1e-9 for below, above in itertools.pairwise(places))
    assert all(-1e-9 <= place <= 1 for place in places)
    if all(above - below >= gap for below, above in itertools.pairwise(heights)):
        assert places == heights


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


def browser(tmp_path: Path, width: int, height: int) -> list[str]:
    return [
        *(chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"),
        *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},{height}"),
    ]


def measured(page: Path, expression: str, tmp_path: Path, width: int, height: int):
    """What a JavaScript expression is in a page that a browser shows."""
    script = f"<script>parent.document.title = JSON.stringify({expression})</script></body>"
    inner = html.escape(page.read_text().replace("</body>", script))
    file = tmp_path / "measured.html"
    # In a frame, for Chromium has no window as narrow as a telephone.
    file.write_text(f'<title></title><iframe width="{width}" height="{height}" srcdoc="{inner}"></iframe>')
    command = [*browser(tmp_path, width, height), "--dump-dom", file.as_uri()]
    dump = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dump.stdout)[1]))


def test_a_browser_shows_every_plot(results, page, tmp_path):
    """Where the browser says the plots are, its screenshot has them."""
    expression = """[...document.querySelectorAll("figure svg")].map(svg => {
      const box = svg.getBoundingClientRect();
      return [box.left + scrollX, box.top + scrollY, box.width, box.height, svg.querySelectorAll("text").length];
    })"""
    width, height = 1100, 6000
    boxes = measured(page, expression, tmp_path, width, height)
    assert len(boxes) == sum(PLOTS[kind] for kind in results)
    shot = tmp_path / "shot.png"
    command = [*browser(tmp_path, width, height), f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    pixels = image.imread(shot)[..., :3]
    for left, top, wide, high, words in boxes:
        assert wide > 400 and high > 80 and words > 5
        part = pixels[int(top) : int(top + high), int(left) : int(left + wide)]
        assert part.shape[:2] == (int(top + high) - int(top), int(left + wide) - int(left)), "within the screenshot"
        colourful = (part.max(-1) - part.min(-1) > 0.2).mean()
        dark = (part.max(-1) < 0.4).mean()
        assert colourful > 5e-4 and dark > 1e-3, "data in colours, words and axes in black"


@pytest.fixture(scope="module")
def crowded_page(results, tmp_path_factory) -> Path:
    """Thirteen caches whose points all but coincide, with long names, beside the other kinds of results."""
    directory = tmp_path_factory.mktemp("crowded")
    content = json.loads(results["eval"].read_text())
    row = next(row for row in content["results"] if row["kl"] > 0)
    content["results"] = [
        row | {"cache": f"logquant:bits=2,window={32 * (i + 1)}", "kl": row["kl"] * (1 + i / 1000)} for i in range(13)
    ]
    content["command"] = "logquant eval " + "a_rather_long_name_of_a_text.txt " * 20
    content["machine"]["cpu"] = "x" * 200
    file = directory / f"{'long_name_' * 12}.json"
    file.write_text(json.dumps(content))
    page = directory / "report.html"
    page.write_text(render([file, *(other for kind, other in results.items() if kind != "eval")]))
    return page


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_overflows_the_page_and_no_label_another(crowded_page, tmp_path, width):
    expression = """{
      width: [document.documentElement.scrollWidth, innerWidth],
      tables: [...document.querySelectorAll("table")].map(e => [e.scrollWidth, e.parentElement.clientWidth]),
      labels: [...document.querySelectorAll("figure svg")].map(svg => [...svg.querySelectorAll("text")].map(text => {
        const box = text.getBoundingClientRect();
        return [text.textContent, box.left, box.top, box.right, box.bottom];
      }))
    }"""
    found = measured(crowded_page, expression, tmp_path, width, 3000)
    assert found["width"][0] <= found["width"][1] == width
    assert all(room < width for _, room in found["tables"])
    assert any(wide > room for wide, room in found["tables"]), "one is too wide, and scrolls in its place"
    assert sum(name.startswith("logquant:bits=2,") for name, *_ in found["labels"][0]) == 13
    for labels in found["labels"]:
        for (one, *a), (other, *b) in itertools.combinations(labels, 2):
            apart = a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] - 1 or b[1] >= a[3] - 1
            assert apart, f"{one!r} and {other!r}"
