"""The HTML of a report: photos, images, curves and scores on a page without scripts or requests.

Every text is escaped, and the page's own policy forbids scripts and the network, whatever a text holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from string import Template

_POINTS = 300  # of a curve; more steps are averaged
_WIDTH, _HEIGHT = 320, 120  # of a plot, in its own units
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #5d5f68; --line: #dcdde3; --back: #fff; --card: #f6f6f9;
  --accent: #2357d8; --note: #fff6dc; --note-line: #e6cf86; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf1; --soft: #a6a8b3; --line: #34363f; --back: #131418;
  --card: #1c1e24; --accent: #86a8ff; --note: #2f2912; --note-line: #6b5a1e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 1.25rem 0 .4rem; }
p { margin: .4rem 0; } .soft, figcaption, dt { color: var(--soft); } figcaption, .small { font-size: .85rem; }
.note { background: var(--note); border: 1px solid var(--note-line); border-radius: .6rem; padding: .6rem .9rem;
  margin: 1rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .8rem 0; } dd { margin: 0; }
figure { margin: 0; } figcaption { padding: .3rem .1rem 0; line-height: 1.35; }
img { display: block; width: 100%; height: auto; border-radius: .5rem; background: var(--card); }
.tiles { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); align-items: end; }
.pairs { display: grid; gap: 1.2rem 1.6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, calc(var(--tiles) * 118px)), 1fr)); align-items: end; }
.row { display: grid; gap: .5rem; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); align-items: start; }
.strip { display: flex; gap: .5rem; overflow-x: auto; padding-bottom: .4rem; } .strip figure { flex: 0 0 132px; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); }
.plots figure { background: var(--card); border-radius: .6rem; padding: .7rem; }
svg { display: block; width: 100%; height: auto; } svg text { font: 10px system-ui, sans-serif; fill: var(--soft); }
.axis { stroke: var(--line); } .raw, .mean { fill: none; stroke: var(--accent); stroke-linejoin: round; }
.raw { opacity: .3; } .mean { stroke-width: 2; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: right; padding: .4rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; white-space: normal; } thead th { color: var(--soft); font-weight: 600; }
pre { background: var(--card); border-radius: .6rem; padding: .8rem; overflow-x: auto; font-size: .82rem; }
code { background: var(--card); border-radius: .3rem; padding: .1rem .3rem; font-size: .9em; }
pre code { padding: 0; } summary { cursor: pointer; }
@media (max-width: 480px) { body { padding: 1rem .8rem 3rem; } .tiles { grid-template-columns: 1fr 1fr; }
  th, td { padding: .4rem .45rem; } }
@media print { details { display: none; } figure, .row { break-inside: avoid; } }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<meta name="generator" content="echodistill $version">
<title>$title</title>
<style>$style</style>
</head>
<body>
$body
</body>
</html>
""")


@dataclass(frozen=True)
class Tile:
    """One image of the page.

    Attributes:
        source: its `data:` address.
        caption: text below it.
        alt: text in place of it; the caption if it is "".
    """

    source: str
    caption: str = ""
    alt: str = ""


@dataclass(frozen=True)
class ScoreRow:
    """A row of the table of scores.

    Attributes:
        name: such as "student".
        note: how its images were made.
        scores: CLIP-I, DINO and CLIP-T; None where there is none.
    """

    name: str
    note: str
    scores: Sequence[float | None]


@dataclass(frozen=True)
class Report:
    """All that a page shows. An empty part is left out.

    Attributes:
        title: the name of the run.
        subject: token and class name.
        version: of the package.
        facts: names and values.
        photos: of the subject.
        comparisons: images of several models or moments, by their prompt.
        comparison_note: a sentence on them.
        scores: a row for each model.
        score_note: a sentence on them.
        strips: one image for each of some steps, by prompt.
        curves: (step, value) points by the name of a loss.
        settings: of the training, as TOML.
        commands: for the next things to do, with what they do.
    """

    title: str
    subject: str
    version: str
    facts: Mapping[str, str] = field(default_factory=dict)
    photos: Sequence[Tile] = ()
    comparisons: Mapping[str, Sequence[Tile]] = field(default_factory=dict)
    comparison_note: str = ""
    scores: Sequence[ScoreRow] = ()
    score_note: str = ""
    strips: Mapping[str, Sequence[Tile]] = field(default_factory=dict)
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    settings: str = ""
    commands: Mapping[str, str] = field(default_factory=dict)


def page(report: Report) -> str:
    """Return a report as one HTML page."""
    sections = (_head, _comparisons, _scores, _photos, _strips, _plots, _settings, _commands)
    return _PAGE.substitute(
        policy=_POLICY,
        version=escape(report.version),
        title=escape(f"{report.title}: report"),
        style=_STYLE,
        body="\n".join(filter(None, (section(report) for section in sections))),
    )


def _head(report: Report) -> str:
    count = f"{len(report.photos)} photo{'s' * (len(report.photos) != 1)}"
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in report.facts.items())
    return (
        f'<h1>{escape(report.title)}</h1>\n<p class="soft">The subject <b>{escape(report.subject)}</b>, '
        f'by echodistill {escape(report.version)}.</p>\n<p class="note"><b>This page contains {count} of the subject.'
        "</b> Share it only with people who may see them. <code>export</code>, its uploads and copies in a "
        f"<code>--store</code> leave this page out.</p>\n<dl>{facts}</dl>"
    )


def _comparisons(report: Report) -> str:
    pairs = (f"<div><h3>{escape(p)}</h3>{_figures('row', tiles)}</div>" for p, tiles in report.comparisons.items())
    note = f'<p class="soft">{escape(report.comparison_note)}</p>'
    widest = max(map(len, report.comparisons.values()), default=1)
    grid = f'<div class="pairs" style="--tiles: {widest}">{"".join(pairs)}</div>'
    return _section("Before and after", note, grid, report.comparisons)


def _scores(report: Report) -> str:
    names = "".join(f'<th scope="col">{name}</th>' for name in ("", "CLIP-I", "DINO", "CLIP-T"))
    rows = "".join(map(_score_row, report.scores))
    table = f"<table><thead><tr>{names}</tr></thead><tbody>{rows}</tbody></table>"
    note = f'<p class="soft">{escape(report.score_note)}</p>'
    return _section("Scores", f'<div class="scroll">{table}</div>', note, report.scores)


def _score_row(row: ScoreRow) -> str:
    cells = "".join(f"<td>{'' if score is None else f'{score:.3f}'}</td>" for score in row.scores)
    name = f'{escape(row.name)} <span class="soft small">{escape(row.note)}</span>'
    return f'<tr><th scope="row">{name}</th>{cells}</tr>'


def _photos(report: Report) -> str:
    return _section("Photos", _figures("tiles", report.photos), "", report.photos)


def _strips(report: Report) -> str:
    strips = (f"<h3>{escape(p)}</h3>{_figures('strip', tiles, focus=True)}" for p, tiles in report.strips.items())
    note = (
        '<p class="soft">The same prompt and seed at several steps. Without the token, a class should not change.</p>'
    )
    return _section("Previews by step", note, "".join(strips), report.strips)


def _plots(report: Report) -> str:
    plots = "".join(_plot(name, points) for name, points in report.curves.items())
    note = '<p class="soft">Pale: each step. Strong: a running mean.</p>'
    return _section("Losses", note, f'<div class="plots">{plots}</div>', report.curves)


def _settings(report: Report) -> str:
    details = f"<details><summary>All settings, as TOML</summary><pre><code>{escape(report.settings)}</code></pre>"
    return _section("Settings", details, "</details>", report.settings)


def _commands(report: Report) -> str:
    rows = (f"<p>{escape(text)}: <code>{escape(command)}</code></p>" for text, command in report.commands.items())
    return _section("Next", "".join(rows), "", report.commands)


def _section(heading: str, first: str, second: str, content: object) -> str:
    """Return a part of the page; nothing if it has no content."""
    return f"<section>\n<h2>{heading}</h2>\n{first}\n{second}\n</section>" if content else ""


def _figures(kind: str, tiles: Iterable[Tile], *, focus: bool = False) -> str:
    """Return images in one of the arrangements of the style; `focus` lets a keyboard scroll them."""
    figures = (
        f'<figure><img src="{escape(tile.source)}" alt="{escape(tile.alt or tile.caption)}">'
        f"<figcaption>{escape(tile.caption)}</figcaption></figure>"
        for tile in tiles
    )
    return f'<div class="{kind}"{" tabindex=0" * focus}>{"".join(figures)}</div>'


def _plot(name: str, points: Sequence[tuple[int, float]]) -> str:
    """Return one curve with its range and its mean as SVG; at least two points."""
    thinned = _thinned(points)
    steps, values = [step for step, _ in thinned], [value for _, value in thinned]
    low, high = min(values), max(values)
    left, bottom, top = 46, _HEIGHT - 18, 8

    def x(step: float) -> float:
        return left + (step - steps[0]) / max(steps[-1] - steps[0], 1e-9) * (_WIDTH - left - 4)

    def y(value: float) -> float:
        return bottom - (value - low) / max(high - low, 1e-12) * (bottom - top)

    means = _running_mean(values)
    words = f"{name}: {values[0]:.3g} at step {points[0][0]}, {means[-1]:.3g} around step {points[-1][0]}"
    lines = "".join(
        f'<polyline class="{kind}" points="{_path(zip(steps, series, strict=True), x, y)}"/>'
        for kind, series in (("raw", values), ("mean", means))
    )
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(words)}">'
        f'<path class="axis" d="M{left} {top - 4}V{bottom + 4}H{_WIDTH}" fill="none"/>{lines}'
        f'<text x="{left - 5}" y="{top + 4}" text-anchor="end">{high:.2g}</text>'
        f'<text x="{left - 5}" y="{bottom + 3}" text-anchor="end">{low:.2g}</text>'
        f'<text x="{left}" y="{_HEIGHT - 3}">step {points[0][0]}</text>'
        f'<text x="{_WIDTH - 2}" y="{_HEIGHT - 3}" text-anchor="end">{points[-1][0]}</text></svg>'
        f"<figcaption><b>{escape(name)}</b> {means[-1]:.3g} at the end</figcaption></figure>"
    )


def _path(points: Iterable[tuple[float, float]], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Return the means of equal groups of points, of which there are at most `_POINTS`."""
    size = math.ceil(len(points) / _POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(step for step, _ in g) / len(g), sum(value for _, value in g) / len(g)) for g in groups]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Return the mean of each value with its neighbors, in windows of about a tenth of all."""
    half = max(1, len(values) // 20)
    windows = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]
