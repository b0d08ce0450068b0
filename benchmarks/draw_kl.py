"""Draws what caches lose: ``python -m benchmarks.draw_kl [DIRECTORY]``, from benchmarks/results.

Three pictures: against bytes held, of all methods; against bytes that a decode step reads, of those that read part of
what they hold; and along texts, of what keeps the same pages and other exact tokens.
Full caches of 32 bits were measured; exact tokens count as those of 16 bits, as models are served.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
OURS, OTHERS, INK = "#0b5fa5", "#8a96a1", "#1f2933"
# SmolLM2-135M: bytes of a token in float32, as measured, all layers and heads; half of that in 16 bits.
TOKEN = 46_080

# What each point is called, on which side of it, and by how many points higher.
Labels = dict[str, tuple[str, str, int]]
HELD: Labels = {
    "small": ("small", "left", 0),
    "logquant": ("logquant", "left", 0),
    "logquant:key_columns=1.5": ("key_columns=1.5", "right", 0),
    "log": ("log: LogQuant's rule", "right", 5),
    "recent": ("recent", "right", -5),
    "paper": ("LogQuant as published", "right", 0),
    "kvarn": ("KVarN, 4-bit keys", "right", 0),
    "kvarn:key_bits=2": ("KVarN", "right", 0),
    "kitty:sinks=128": ("Kitty", "right", 0),
    "nexusquant:window=96": ("NexusQuant's E8", "right", 0),
    "turboquant:window=96": ("TurboQuant", "left", 4),
    "kivi:residual=224": ("KIVI", "right", 0),
    "oscar:sinks=4,recent=160": ("OSCAR", "left", 0),
    "occam:residual=256": ("OScaR", "right", 0),
    "h2o:heavy=218,recent=218": ("H2O, exact", "left", -4),
    "streaming:recent=438": ("StreamingLLM, exact", "left", 0),
    "hqq": ("transformers, HQQ", "right", 0),
}
READ: Labels = {
    "logquant": ("logquant, all pages", "right", 0),
    "logquant:recall=both(pages=0.5)": ("half of the pages", "right", 0),
    "logquant:recall=both(pages=0.25)": ("a quarter", "right", 0),
    "logquant:recall=both(pages=0.125)": ("an eighth", "right", 0),
    "clusterkv:budget=1024": ("ClusterKV, 1,024 exact tokens", "left", 0),
    "clusterkv:budget=512": ("ClusterKV, 512", "right", 0),
}
ALONG = {"recent:window=128": "recent, twice the exact tokens"} | {n: n for n in ("recent", "log", "logquant", "fine")}


def rows(*names: str) -> dict[str, dict[str, Any]]:
    """The results of some files by cache; of a cache that is in several, those of the last."""
    files = [json.loads((RESULTS / f"eval_smollm2_{name}.json").read_text()) for name in names]
    return {row["cache"]: row for file in files for row in file["results"]}


def held(row: dict[str, Any], tokens: int) -> float:
    """MB of a text with exact tokens of 16 bits."""
    packed = packed_tokens(row, tokens)
    return (row["bytes"] - (tokens - packed) * TOKEN / 2) / 1e6


def packed_tokens(row: dict[str, Any], tokens: int) -> float:
    """How many tokens of a text are packed: the others take :data:`TOKEN` bytes each."""
    return (tokens * TOKEN - row["bytes"]) / (TOKEN - row["bytes_per_token"])


def read(row: dict[str, Any], tokens: int) -> float:
    """MB that a step reads, with exact tokens of 16 bits: an estimate from how many pages or tokens are chosen."""
    name, _, options = row["cache"].partition(":")
    if name == "clusterkv":
        budget, layers, skipped = int(options.removeprefix("budget=")), 30, 2
        # Sinks, and what is in no cluster yet; of each of a cluster's 80 tokens a centroid, as long as a key.
        share = (budget + 16 + (tokens - 4096) + (4096 / 80) / 2) / tokens
        return tokens * TOKEN / 2 * (skipped + (layers - skipped) * share) / layers / 1e6
    pages = packed_tokens(row, tokens) * row["bytes_per_token"]
    share = float(options[options.index("pages=") + 6 : -1]) if options else 1.0
    # Two layers of 30 read all. Whoever chooses by bounds reads the scales and zeros of all keys: 5 % of a page.
    chosen = (2 + 28 * min(1.0, share + 0.05 * bool(options))) / 30
    return held(row, tokens) - pages * (1 - chosen) / 1e6


def picture(
    found: dict[str, dict[str, Any]],
    labels: Labels,
    x_of: Callable[[dict[str, Any]], float],
    x_label: str,
    line: list[str],
) -> Figure:
    """KL against something, each point with its name; ours in colour, joined in the order of ``line``."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes: Axes = figure.subplots()
    _plain(axes, x_label)
    joined = [(x_of(found[name]), found[name]["kl"]) for name in line]
    axes.plot(*zip(*joined, strict=True), color=OURS, linewidth=1, alpha=0.5)
    for cache, (label, side, higher) in labels.items():
        x, y = x_of(found[cache]), found[cache]["kl"]
        ours = cache in line or cache in ("log", "recent")
        axes.plot(x, y, "o", color=OURS if ours else OTHERS, markersize=7 if cache == "logquant" else 5)
        axes.annotate(
            label,
            (x, y),
            xytext=(7 if side == "right" else -7, higher),
            textcoords="offset points",
            ha="left" if side == "right" else "right",
            va="center",
            fontsize=9,
            color=OURS if ours else INK,
            fontweight="bold" if cache == "logquant" else "normal",
        )
    axes.margins(x=0.18, y=0.08)
    return figure


def along(found: dict[str, dict[str, Any]], labels: dict[str, str]) -> Figure:
    """KL along texts, each line with its name at its end; ours in colour."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes: Axes = figure.subplots()
    _plain(axes, "tokens after the prompt")
    for cache, label in labels.items():
        each = found[cache]["kl_along"]
        x = [each["tokens"] * (i + 1) for i in range(len(each["kl"]))]
        colour = OURS if cache in ("logquant", "fine") else OTHERS
        axes.plot(x, each["kl"], color=colour, linewidth=2.5 if cache == "logquant" else 1.3)
        axes.annotate(
            label,
            (x[-1], each["kl"][-1]),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colour if colour == OURS else INK,
            fontweight="bold" if cache == "logquant" else "normal",
            annotation_clip=False,
        )
    return figure


def _plain(axes: Axes, x_label: str) -> None:
    """Axes as all pictures have them."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set(xlabel=x_label, ylabel="KL to the full cache, nats a token", yscale="log")


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs"
    every = rows("table", "neighbours", "equal_bytes", "presets")
    pictures = {
        "kl_held": picture(
            every,
            HELD,
            lambda row: held(row, 1512),
            "MB held after 1,512 tokens (a full cache of 16 bits: 34.8)",
            ["small", "logquant", "logquant:key_columns=1.5"],
        ),
        "kl_read": picture(
            rows("recall"),
            READ,
            lambda row: read(row, 4224),
            "MB read by a step after 4,224 tokens (a full cache of 16 bits: 97)",
            ["logquant", *(f"logquant:recall=both(pages={share})" for share in (0.5, 0.25, 0.125))],
        ),
        "kl_along": along(rows("along"), ALONG),
    }
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "logquant"}):
        for name, figure in pictures.items():
            figure.savefig(target / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
