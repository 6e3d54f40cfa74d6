"""The page: its head, both tabs, its look. Nothing in it is loaded from another machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from echodistill_cli.live import markup
from echodistill_cli.live.desk import Desk
from echodistill_cli.live.generate import QUIET, GenerateTab
from echodistill_cli.live.train import TrainTab
from echodistill_cli.live.trainer import Trainer

_TITLE = "echodistill live"
_HEAD = f"""<div class="ed-head"><h1>{_TITLE}</h1>
<p>Type a prompt: one step draws your subject while you type. Nothing leaves this machine.</p></div>"""
# Drop-downs and buttons of gradio stay readable on a phone; a page's language lets screen readers speak it.
_HTML_HEAD = """<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">
<script>document.documentElement.lang = "en"</script>"""


def build(
    desk: Desk, trainer: Trainer, private: Path, *, training: bool = True, sweep: tuple[int, int] = (60, 600)
) -> gr.Blocks:
    """Return the page.

    Args:
        desk: serves the wishes of all people.
        trainer: starts and watches runs.
        private: folder of temporary files.
        training: whether the page can train.
        sweep: seconds between two looks for old temporary files, and their age then.
    """
    desk.kept_folder.mkdir(parents=True, exist_ok=True)
    gr.set_static_paths([desk.kept_folder.absolute()])  # served where they lie, without a copy
    can_draw = bool(desk.subjects() or desk.studio.model)
    generate, train = GenerateTab(desk, private), TrainTab(trainer, desk, private)
    with gr.Blocks(title=_TITLE, analytics_enabled=False, delete_cache=sweep, fill_width=True) as page:
        gr.HTML(_HEAD)
        with gr.Tabs(selected="generate" if can_draw or not training else "train") as tabs:
            with gr.Tab("Generate", id="generate"):
                generate.build()
            if training:
                with gr.Tab("Train", id="train"):
                    train.build()
        if training:
            train.connect(tabs, generate)
            page.load(train.open, None, train.run, **QUIET)
        generate.redraw(page.load(generate.open, None, [generate.subject, generate.prompt, generate.kept], **QUIET))
    page.queue(max_size=200, api_open=False)
    return page


def look() -> dict[str, Any]:
    """Return the theme and the style, for `launch`; only fonts of the person's own system are used."""
    fonts = ["ui-sans-serif", "system-ui", "sans-serif"]
    theme = gr.themes.Default(
        primary_hue="emerald",
        secondary_hue="emerald",
        neutral_hue="slate",
        font=fonts,
        font_mono=["ui-monospace", "monospace"],
    )
    return {"theme": theme, "css": markup.STYLE, "head": _HTML_HEAD}
