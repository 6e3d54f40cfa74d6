"""HTML for what gradio has no component for: images with their words, verdicts, progress, style.

Images are embedded in the page. So a picture is one answer of the server, and no file of it is left on the disk.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from echodistill_cli.data.images import data_uri, png_bytes
from echodistill_cli.data.photos import PhotoReport
from echodistill_cli.errors import counted
from echodistill_cli.live.desk import Waiting
from echodistill_cli.live.studio import Drawing
from echodistill_cli.live.subjects import TakeAway
from echodistill_cli.live.trainer import Progress

_THUMBNAIL, _PREVIEW = 160, 1024  # pixels
_STATES = {
    "starting": "Loading models and photos",
    "training": "Training",
    "done": "Done",
    "stopped": "Stopped and saved: Resume goes on from there",
    "failed": "Failed",
}

STYLE = """
.gradio-container > main { max-width: 1180px !important; margin: 0 auto !important; padding: 1rem !important; }
.ed-pair { flex-wrap: nowrap !important; gap: .25rem !important; }
.ed-ms, .ed-figure b { white-space: nowrap; }
#steps .wrap { gap: .35rem; } #steps .wrap label { padding: .35rem .6rem; }
@media (max-width: 640px) { #kept .grid-container { grid-template-columns: repeat(3, 1fr) !important; } }
.ed-head { display: flex; gap: .75rem; align-items: baseline; flex-wrap: wrap; }
.ed-head h1 { font-size: 1.35rem; margin: 0; font-weight: 650; }
.ed-head p { margin: 0; color: var(--body-text-color-subdued); }
.ed-figure { margin: 0; display: flex; flex-direction: column; gap: .4rem; }
.ed-frame { aspect-ratio: 1; border-radius: var(--radius-lg); overflow: hidden; display: grid; place-items: center;
  background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary);
  color: var(--body-text-color-subdued); text-align: center; }
.ed-frame img { width: 100%; height: 100%; object-fit: contain; }
.ed-frame p { padding: 1rem; }
.ed-figure figcaption { display: flex; justify-content: space-between; gap: .5rem; font-size: .9rem;
  color: var(--body-text-color-subdued); }
.ed-figure figcaption b { color: var(--body-text-color); font-weight: 600; }
.ed-note { margin: .2rem 0 0; font-size: .9rem; color: var(--body-text-color-subdued); min-height: 1.3em; }
.ed-cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: .7rem; padding: 0;
  margin: 0; list-style: none; }
.ed-card { border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); overflow: hidden;
  background: var(--background-fill-secondary); font-size: .82rem; margin: 0 !important; }
.ed-card img { width: 100%; aspect-ratio: 1; object-fit: cover; display: block; }
.ed-card div { padding: .4rem .55rem .5rem; overflow-wrap: anywhere; }
.ed-badge { display: inline-block; border-radius: 99px; padding: 0 .55em; font-weight: 600; color: #fff; }
.ed-ok { background: #15803d; } .ed-warning { background: #a16207; } .ed-skipped { background: #b91c1c; }
#grid .grid-wrap, #kept .grid-wrap { min-height: 0 !important; max-height: none !important; height: auto !important; }
#grid, #kept { min-height: 0 !important; }
.ed-progress progress { width: 100%; height: .7rem; appearance: none; border: 0; border-radius: 99px; overflow: hidden;
  background: var(--border-color-primary); accent-color: var(--color-accent); }
.ed-progress progress::-webkit-progress-bar { background: var(--border-color-primary); }
.ed-progress progress::-webkit-progress-value { background: var(--color-accent); }
.ed-progress progress::-moz-progress-bar { background: var(--color-accent); }
.ed-progress p { margin: .15rem 0; } .ed-progress code { overflow-wrap: anywhere; font-size: .82rem; }
.ed-bar { display: flex; justify-content: space-between; gap: 1rem; flex-wrap: wrap; font-weight: 600; }
.ed-preview img { max-width: 100%; width: 100%; border-radius: var(--radius-lg); }
.ed-table { width: 100%; border-collapse: collapse; font-size: .9rem; }
.ed-table th { text-align: left; font-weight: 600; padding: .3rem .8rem .3rem 0; vertical-align: top; }
.ed-table td { padding: .3rem 0; overflow-wrap: anywhere; }
"""


def figure(drawing: Drawing, name: str) -> str:
    """Return an image with its name and the time that it took; saved from the page, it has its metadata."""
    image, texts = drawing.images[0], drawing.texts[0]
    source = base64.b64encode(png_bytes(image, texts, level=1)).decode()
    alt = escape(f"{texts['prompt']} ({name})")
    return (
        f'<figure class="ed-figure"><div class="ed-frame"><img alt="{alt}" data-prompt="{escape(texts["prompt"])}" '
        f'data-seed="{texts["seed"]}" src="data:image/png;base64,{source}"></div><figcaption><b>{escape(name)}</b>'
        f'<span class="ed-ms">{drawing.seconds * 1000:.0f} ms</span></figcaption></figure>'
    )


def empty_figure(words: str, name: str) -> str:
    """Return a frame without an image, with a sentence in it."""
    return (
        f'<figure class="ed-figure"><div class="ed-frame"><p>{escape(words)}</p></div>'
        f"<figcaption><b>{escape(name)}</b></figcaption></figure>"
    )


def note(lines: Sequence[str]) -> str:
    """Return sentences on the prompt; a screen reader tells them when it has time."""
    return f'<p class="ed-note" role="status">{escape(" ".join(lines))}</p>'


def place_in_line(waiting: Waiting) -> str:
    """Return how many are served first."""
    people = counted(waiting.before, "image is", "images are")
    return note([f"Waiting: {people} before yours."])


def verdicts(report: PhotoReport) -> str:
    """Return a card per photo: a small image, the verdict, and the reasons."""
    used = {photo.path.name: photo.image for photo in report.photos}
    cards = []
    for file in report.files:
        image = f'<img alt="" src="{data_uri(used[file.name], _THUMBNAIL)}">' if file.name in used else ""
        cards.append(
            f'<li class="ed-card">{image}<div><span class="ed-badge ed-{file.verdict}">{file.verdict}</span> '
            f"{escape(file.name)}<br>{escape('; '.join(file.notes))}</div></li>"
        )
    lines = [f"{len(report.photos)} of {counted(len(report.files), 'file is', 'files are')} usable.", *report.warnings]
    return f'{note(lines)}<ul class="ed-cards" aria-label="Photos">{"".join(cards)}</ul>'


def bar(progress: Progress) -> str:
    """Return the state of a training, its bar, and what it said last."""
    value = f'value="{progress.step}" max="{progress.steps}"' if progress.steps else ""
    if not progress.steps and not progress.is_running:
        value = 'value="0" max="1"'
    count = f"{progress.step} of {counted(progress.steps, 'step')}" if progress.steps else ""
    return (
        f'<div class="ed-progress" role="status" data-state="{progress.state}"><p class="ed-bar">'
        f"<span>{escape(progress.name)}: {_STATES[progress.state]}</span><span>{count}</span></p>"
        f'<progress aria-label="Progress of the training" {value}></progress>'
        f"<p><code>{escape(progress.line)}</code></p></div>"
    )


def preview(file: Path | None) -> str:
    """Return the newest preview of a run; nothing while there is none."""
    if file is None:
        return ""
    try:
        with Image.open(file) as sheet:
            source = data_uri(sheet, _PREVIEW)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # a stranger's run
        return ""
    step = int(file.stem.rpartition("-")[2])
    words = f"Preview at step {step}: the subject on the left, its class on the right"
    image = f'<img alt="{words}" src="{source}">'
    return f'<figure class="ed-preview ed-figure">{image}<figcaption>{words}</figcaption></figure>'


def tools(away: TakeAway) -> str:
    """Return a table with a line per tool."""
    rows = "".join(f"<tr><th scope=row>{escape(tool)}</th><td>{escape(line)}</td></tr>" for tool, line in away.lines)
    return f'<table class="ed-table" aria-label="Where to put the files">{rows}</table>'


def loss_rows(losses: Sequence[Mapping[str, float]], names: Sequence[str]) -> list[tuple[float, float, str]]:
    """Return (step, value, loss) of each known value, for a plot."""
    return [(one["step"], one[name], name) for one in losses for name in names if one.get(name) is not None]
