"""Draws which tokens stay exact, as the cache keeps them: ``python benchmarks/draw_window.py [FILE]``.

Under the rules ``log`` and ``recent`` their number says it; under ``attention`` a layer of SmolLM2 does, which reads
this repository's licence.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

import torch

from logquant import LogQuantCache, as_argument
from logquant.models import load
from logquant.rule import Rule, split_positions

# Small, so that single tokens can be seen; a cache has 64 by default. The rule is the same.
WINDOW = 32
# Here all rules keep the same number of tokens.
LENGTHS = (112, 208, 400, 784)
LAYER = 12
TITLES: dict[Rule, str] = {
    "attention": f"attention: what is looked at least leaves (the default; layer {LAYER} of SmolLM2, on a licence)",
    "log": "log: every second token leaves, again and again (the paper's)",
    "recent": "recent: the oldest tokens leave",
}
SINKS: dict[Rule, int] = {"attention": 4, "log": 0, "recent": 4}

LEFT, TOP, TOKEN, ROW, BAR = 118, 62, 1.0, 26, 16
WIDTH = LEFT + TOKEN * LENGTHS[-1] + 24
EXACT, PACKED, INK, FAINT = "#0b5fa5", "#d3dde6", "#1f2933", "#66737f"


def text(
    x: float, y: float, content: str, size: int = 12, fill: str = FAINT, anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>{content}</text>'


def bar(x: float, y: float, tokens: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{TOKEN * tokens:g}" height="{BAR}" fill="{fill}"/>'


def chosen() -> dict[int, list[int]]:
    """The exact tokens of one layer under the rule ``attention``, at each of the lengths."""
    model, tokenizer = load()
    model.set_attn_implementation("logquant")
    text = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : LENGTHS[-1]]
    cache, found = LogQuantCache(model.config, window=WINDOW), {}
    with torch.no_grad():
        for start, end in zip((0, *LENGTHS), LENGTHS, strict=False):
            for part in [ids[:, start:end]] if not start else ids[:, start:end].split(1, 1):
                model(part, **as_argument(cache))
            cache.commit()
            layer = cache.layers[LAYER]
            found[end] = layer.held.layout.positions(ids.device)[0, layer.rows.packed :].tolist()
    return found


def row(exact: list[int], length: int, y: float) -> list[str]:
    """One sequence: a bar of packed tokens with the runs of exact ones on it."""
    shapes = [text(LEFT - 12, y + 12, f"{length} tokens", anchor="end"), bar(LEFT, y, length, PACKED)]
    # In a run of consecutive positions the difference to their rank is constant.
    for _, run in groupby(enumerate(exact), key=lambda item: item[1] - item[0]):
        positions = [position for _, position in run]
        shapes.append(bar(LEFT + TOKEN * positions[0], y, len(positions), EXACT))
    return shapes


def draw() -> str:
    """The picture as SVG."""
    shapes, y, by_attention = [], TOP, chosen()
    for rule, title in TITLES.items():
        shapes.append(text(LEFT, y, title, size=14, fill=INK, bold=True))
        y += 12
        for length in LENGTHS:
            counted = rule != "attention"
            exact = split_positions(length, WINDOW, rule, SINKS[rule])[1].tolist() if counted else by_attention[length]
            shapes += row(exact, length, y)
            y += ROW
        y += 34
    last = y - 34
    shapes += [
        text(LEFT, last + 12, "first token"),
        text(LEFT + TOKEN * LENGTHS[-1], last + 12, "newest token", anchor="end"),
        f'<rect x="{LEFT}" y="22" width="12" height="12" rx="2" fill="{EXACT}"/>',
        text(LEFT + 18, 32, "exact"),
        f'<rect x="{LEFT + 72}" y="22" width="12" height="12" rx="2" fill="{PACKED}"/>',
        text(LEFT + 90, 32, "packed in 2 bits"),
        text(LEFT + TOKEN * LENGTHS[-1], 32, f"drawn with W = {WINDOW}; the default is 64", anchor="end"),
    ]
    height = last + 30
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {height}" width="{WIDTH:g}" height="{height}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" role="img" '
        'aria-label="Which tokens stay exact as a sequence grows">'
    )
    background = f'<rect width="{WIDTH:g}" height="{height}" rx="8" fill="#ffffff"/>'
    return "\n".join([head, background, *shapes, "</svg>", ""])


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "exact_tokens.svg"
    target.parent.mkdir(exist_ok=True)
    target.write_text(draw(), encoding="utf-8")
