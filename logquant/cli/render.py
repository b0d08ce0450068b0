"""``logquant report``: one self-contained page of HTML from results that ``--json`` has written."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ..texts import read_text

Rows = list[dict[str, Any]]

_PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>logquant: results</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2, .machine { overflow-wrap: anywhere; }
h2 { margin-top: 3rem; }
pre { background: #f3f3f3; padding: .8rem; overflow-x: auto; }
.scroll { margin: 1rem 0; overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg { width: 100%; min-width: 36rem; max-width: 48rem; height: auto; }
.machine { color: #666; font-size: .85rem; }
</style>
</head>
<body>
<h1>logquant: results</h1>
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
<pre>{{ section.command }}</pre>
<p class="machine">{{ section.machine }}</p>
{% for table in section.tables %}
<div class="scroll" tabindex="0"><table>
<tr>{% for name in table.columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
{% for plot in section.plots %}
<figure>{{ plot | safe }}</figure>
{% endfor %}
</section>
{% endfor %}
</body>
</html>
"""
)


@dataclass(frozen=True)
class Table:
    """A table: names of columns, and cells as they are shown."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Section:
    """What is shown of one file of results.

    Args:
        title: what was measured.
        command: what measured it, as it was typed.
        machine: where, in words.
        tables: the numbers.
        plots: SVG elements.
    """

    title: str
    command: str
    machine: str
    tables: list[Table] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)


def render(files: Sequence[Path]) -> str:
    """The page.

    Args:
        files: JSON files that ``eval``, ``plan`` or ``bench`` have written.

    Raises:
        OSError: a file that cannot be read.
        ValueError: a file that holds something else.
    """
    sections = [_section(file) for file in files]
    for section, name in zip(sections, _distinct(files), strict=True):
        section.title = f"{section.title}: {name}"
    return _PAGE.render(sections=sections)


def _distinct(files: Sequence[Path]) -> list[str]:
    """A name for each file: as much of the end of its path as tells it from the others, and a number for one again."""
    paths = [file.resolve().with_suffix("").parts for file in files]
    names: list[str] = []
    for parts in paths:
        others = {other for other in paths if other != parts}
        length = next(n for n in range(1, len(parts) + 1) if all(other[-n:] != parts[-n:] for other in others))
        names.append("/".join(parts[-length:]))
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)
    ]


def _section(file: Path) -> Section:
    try:
        content = json.loads(read_text(file))
        kind, results = content["kind"], content["results"]
        title, fill = _KINDS[kind]
        section = Section(title, content["command"], _in_words(content["machine"]))
        fill(section, results)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} must be results that logquant's --json has written, got {error!r}") from None
    return section


def _in_words(machine: dict[str, Any]) -> str:
    return "; ".join(
        f"{name.replace('_', ' ')}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in machine.items()
        if value not in (None, [], "")
    )


# ------------------------------------------------------------------------------------------------ kinds of results
def _eval(section: Section, rows: Rows) -> None:
    for task, fill in (("kl", _divergence), ("greedy", _greedy), ("passkey", _passkey)):
        if rows and all(task in row for row in rows):
            fill(section, rows)


def _greedy(section: Section, rows: Rows) -> None:
    greedy = [row["greedy"] for row in rows]
    section.tables.append(
        Table(
            ("cache", f"of {greedy[0]['tokens']:,} tokens decoded greedily alike", "95 % interval"),
            [
                (
                    row["cache"],
                    f"{row['agreement']:.1f}",
                    "{:.1f} to {:.1f}".format(*row["agreement_interval"]) if row["agreement_interval"] else "",
                )
                for row in greedy
            ],
        )
    )


def _passkey(section: Section, rows: Rows) -> None:
    recalls = [row["passkey"] for row in rows]
    depths = [f"depth {float(depth):g}" for depth in recalls[0]["found_by_depth"]]
    section.tables.append(
        Table(
            ("cache", f"passkeys found in {recalls[0]['length']:,} tokens", "nats a token", *depths),
            [
                (
                    row["cache"],
                    *(f"{number:.2f}" for number in (row["found"], row["nll"], *row["found_by_depth"].values())),
                )
                for row in recalls
            ],
        )
    )


def _divergence(section: Section, rows: Rows) -> None:
    tail = {"kl_p99": "KL, p99", "kl_p999": "KL, p99.9", "kl_above_1": "KL > 1"}
    shown = [key for key in tail if all(key in row for row in rows)]  # older files have none
    section.tables.append(
        Table(
            (
                *("cache", "KL, nats a token", "95 % interval", *(tail[key] for key in shown)),
                *("perplexity", "top-1", "bits an element", "MB a text"),
            ),
            [
                (
                    row["cache"],
                    f"{row['kl']:.4f}",
                    "{:.4f} to {:.4f}".format(*row["kl_interval"]) if row["kl_interval"] else "",
                    *(f"{row[key]:.2%}" if key == "kl_above_1" else f"{row[key]:.4f}" for key in shown),
                    f"{row['ppl']:.2f}",
                    f"{row['top1']:.3f}",
                    f"{row['bits_per_element']:.2f}" if row["bits_per_element"] else "",
                    _megabytes(row["bytes"]),
                )
                for row in rows
            ],
        )
    )
    lossy = [row for row in rows if row["bits_per_element"] and row["kl"] > 0]
    for key, unit, name in (("bits_per_element", 1.0, "bits a quantised element"), ("bytes", 1e6, "MB a text")):
        if not lossy:
            break

        def draw(axes: Axes, key: str = key, unit: float = unit, name: str = name) -> None:
            colours = _colours(len(lossy))
            for row, colour in zip(lossy, colours, strict=True):
                x, kl = row[key] / unit, row["kl"]
                low, high = row["kl_interval"] or (kl, kl)
                error = [[max(0.0, kl - low)], [max(0.0, high - kl)]]
                axes.errorbar(x, kl, yerr=error, fmt="o", capsize=3, color=colour)
            axes.set(xlabel=name, ylabel="KL to the full cache, nats a token", yscale="log")
            _label_beside(axes, [(row["cache"], row[key] / unit, row["kl"]) for row in lossy], colours)

        section.plots.append(_svg(draw, height=max(4.0, 1.0 + 0.25 * len(lossy))))
    if lossy and all(len(row.get("kl_along", {}).get("kl", ())) > 1 for row in lossy):
        section.plots.append(_svg(lambda axes: draw_along(axes, lossy), height=max(4.0, 1.0 + 0.25 * len(lossy))))


def draw_along(axes: Axes, rows: Rows) -> None:
    """The KL of several caches along their texts, as ``kl_along`` of :meth:`CacheScores.as_dict` has it."""
    for row, colour in zip(rows, _colours(len(rows)), strict=True):
        along = row["kl_along"]
        x = [along["tokens"] * (i + 1) for i in range(len(along["kl"]))]
        axes.plot(x, along["kl"], label=row["cache"], color=colour)
    axes.set(xlabel="tokens after the prompt", ylabel="KL to the full cache, nats a token", yscale="log")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _attend(section: Section, rows: Rows) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row["timings"]))
    shapes = [f"batch {row['batch']}, heads {row['heads']}/{row['kv_heads']}, dim {row['dim']}" for row in rows]
    section.tables.append(
        Table(
            ("shape", "tokens", *(f"{name}, ms" for name in names)),
            [
                (shape, f"{row['context']:,}", *(_milliseconds(row["timings"].get(name)) for name in names))
                for shape, row in zip(shapes, rows, strict=True)
            ],
        )
    )
    for shape in dict.fromkeys(shapes):
        of_shape = [row for other, row in zip(shapes, rows, strict=True) if other == shape]

        def draw(axes: Axes, shape: str = shape, of_shape: Rows = of_shape) -> None:
            for name, colour in zip(names, _colours(len(names)), strict=True):
                points = [(r["context"], 1e3 * r["timings"][name]["median"]) for r in of_shape if name in r["timings"]]
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", label=name, color=colour)
            axes.set(xlabel="tokens", ylabel="ms a call", xscale="log", yscale="log", title=shape)
            contexts = sorted({row["context"] for row in of_shape})
            axes.set_xticks(contexts, [f"{tokens:,}" for tokens in contexts])
            axes.minorticks_off()
            axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)

        section.plots.append(_svg(draw, height=max(4.0, 1.0 + 0.25 * len(names))))


def _generate(section: Section, rows: Rows) -> None:
    section.tables.append(
        Table(
            ("cache", "tokens of context", "batch", "tokens/s", "times the full cache's", "step, ms", "MB held"),
            [
                (
                    row["cache"],
                    f"{row['context']:,}",
                    str(row["batch"]),
                    f"{row['tokens_per_second']:.1f}",
                    _ratio(row["speedup"]),
                    _milliseconds(row["timing"]),
                    _megabytes(row["held"]),
                )
                for row in rows
            ],
        )
    )
    labels = [f"{row['cache']}, batch {row['batch']}" for row in rows]
    section.plots.append(_bars(labels, [row["tokens_per_second"] for row in rows], "tokens/s"))


def _memory(section: Section, rows: Rows) -> None:
    kinds = {"peak_rise": "peak, MB", "live_peak_rise": "peak of live memory, MB", "held": "held, MB"}
    section.tables.append(
        Table(("cache", *kinds.values()), [(row["cache"], *(_megabytes(row[key]) for key in kinds)) for row in rows])
    )
    section.plots.append(_bars([row["cache"] for row in rows], [row["held"] / 1e6 for row in rows], "MB held"))


def _plan(section: Section, rows: Rows) -> None:
    section.tables.append(
        Table(
            ("cache", "MB a sequence", "sequences", "longest, tokens"),
            [(r["cache"], _megabytes(r["nbytes"]), f"{r['batch']:,}", f"{r['longest']:,}") for r in rows],
        )
    )
    section.plots.append(_bars([row["cache"] for row in rows], [row["batch"] for row in rows], "sequences that fit"))


_KINDS: dict[str, tuple[str, Callable[[Section, Rows], None]]] = {
    "eval": ("Accuracy, against the full cache", _eval),
    "attend": ("Attention of one token", _attend),
    "generate": ("Decoding", _generate),
    "memory": ("Memory of a prompt", _memory),
    "plan": ("What fits", _plan),
}


# ----------------------------------------------------------------------------------------------------------- pieces
def _ratio(timing: dict[str, Any] | None) -> str:
    return "" if timing is None else f"{timing['median']:.2f} ({timing['quartile1']:.2f} to {timing['quartile3']:.2f})"


def _milliseconds(timing: dict[str, Any] | None) -> str:
    return f"{1e3 * timing['median']:.2f}" if timing else ""


def _megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.1f}"


def _bars(names: Sequence[str], values: Sequence[float], label: str) -> str:
    def draw(axes: Axes) -> None:
        axes.bar_label(axes.barh(names, values), fmt="{:,.1f}", padding=3)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.margins(x=0.15)

    return _svg(draw, height=1.2 + 0.4 * len(names))


def _colours(count: int) -> list[str]:
    """As many colours, no two of them the same."""
    named = [*mpl.color_sequences["tab10"], *mpl.color_sequences["tab20"][1::2]]  # strong ones, then their pale kin
    spread = mpl.colormaps["turbo"](np.linspace(0.02, 0.98, count))
    return [to_hex(colour) for colour in (named[:count] if count <= len(named) else spread)]


def _label_beside(axes: Axes, points: Sequence[tuple[str, float, float]], colours: Sequence[str]) -> None:
    """Names of points ``(name, x, y)`` in a column to the right of the plot, each in a line of its own."""
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [to_axes.transform((x, y))[1] for _, x, y in points]
    order = sorted(range(len(points)), key=heights.__getitem__)
    places = _spread([heights[i] for i in order], 1 / max(12, len(points)))
    for i, place in zip(order, places, strict=True):
        name, x, y = points[i]
        line = {"arrowstyle": "-", "color": colours[i], "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            name, (x, y), xytext=(1.03, place), textcoords="axes fraction", va="center", fontsize=9, arrowprops=line
        )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights within 0 and 1, moved so that they are ``gap`` apart."""
    places = list(heights)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    top = 1.0
    for i in reversed(range(len(places))):
        places[i] = top = min(places[i], top)
        top -= gap
    return places


def _svg(draw: Callable[[Axes], None], height: float = 4.0) -> str:
    """What ``draw`` draws, as an SVG element whose words are text."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "logquant"}):
        figure = Figure(figsize=(8, height), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
