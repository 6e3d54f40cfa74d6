"""The Train tab: photos with verdicts, a training with its losses and previews, stop and resume."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from echodistill_cli.errors import ConfigError
from echodistill_cli.live import markup
from echodistill_cli.live.desk import Desk
from echodistill_cli.live.generate import QUIET, GenerateTab, told
from echodistill_cli.live.trainer import LOSSES, Progress, Trainer, gather, look_at

_SECONDS = 1.0  # between two looks at a run
_COLUMNS = ("step", "value", "loss")
_COLORS = dict(zip(LOSSES, ("#2563eb", "#ea580c", "#dc2626", "#0d9488"), strict=True))
_LEGEND = "Losses: " + ", ".join(map(" ".join, zip(LOSSES, ("blue", "orange", "red", "teal"), strict=True)))


@dataclass
class TrainTab:
    """The components of the tab, and what they do.

    Attributes:
        trainer: starts and watches runs.
        desk: makes room for a training.
        private: folder of temporary files.
    """

    trainer: Trainer
    desk: Desk
    private: Path

    def build(self) -> None:
        """Lay the components out; must run inside a `gr.Blocks`."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                self._form()
            with gr.Column(scale=6, min_width=300):
                self._watch()
        self.photos = gr.State(None, delete_callback=_forget)
        self.shown = gr.State(None)  # of the run that this page shows: name, state, steps
        self.finished = gr.State(None)  # the run whose training this page saw end

    def _form(self) -> None:
        self.upload = gr.File(
            label="Three to six photos", file_count="multiple",
            file_types=["image"], height=150, elem_id="upload",
        )  # fmt: skip
        self.verdicts = gr.HTML(elem_id="verdicts")
        with gr.Row():
            self.token = gr.Textbox(
                "sks", label="Token", info="a rare word", max_length=64, min_width=120, elem_id="token"
            )
            self.class_name = gr.Textbox(
                label="Class", info="what it is", placeholder="dog", max_length=64, min_width=120, elem_id="class-name"
            )
        with gr.Row():
            models = self.trainer.models
            self.model = gr.Dropdown(
                models, value=models[0], label="Model", info="one-step base", min_width=120, elem_id="model"
            )
            self.steps = gr.Number(
                0,
                label="Steps",
                info="0: the model's own",
                precision=0,
                minimum=0,
                min_width=120,
                elem_id="train-steps",
            )
        self.start = gr.Button("Train", variant="primary", size="md", elem_id="train")

    def _watch(self) -> None:
        names = self.trainer.names()
        self.run = gr.Dropdown(
            names, value=self.trainer.running() or next(iter(names), None), label="Run", interactive=True,
            info="also those that were started in a terminal", elem_id="run",
        )  # fmt: skip
        self.progress = gr.HTML("<p>No run yet.</p>", elem_id="progress")
        with gr.Row():
            self.stop = gr.Button("Stop and save", interactive=False, size="md", min_width=120, elem_id="stop")
            self.resume = gr.Button("Resume", interactive=False, size="md", min_width=120, elem_id="resume")
        self.plot = gr.LinePlot(
            pd.DataFrame(columns=list(_COLUMNS)), x="step", y="value", color="loss", height=280, visible=False,
            y_title="loss", x_title="step", label=_LEGEND, color_map=_COLORS, buttons=[], elem_id="losses",
        )  # fmt: skip
        self.preview = gr.HTML(elem_id="preview")

    def connect(self, tabs: gr.Tabs, generate: GenerateTab) -> None:
        """Let the components act, and have the other tab show what was trained."""
        gr.on(
            [self.upload.upload, self.upload.delete, self.upload.clear, self.model.input], self.check,
            [self.upload, self.model, self.photos], [self.photos, self.verdicts], **QUIET,
        )  # fmt: skip
        order = [self.photos, self.token, self.class_name, self.model, self.steps]
        self.start.click(self.begin, order, [self.run, self.shown], **QUIET)
        self.resume.click(self.go_on, self.run, self.shown, **QUIET)
        self.stop.click(self.end, self.run, None, **QUIET)
        outputs = [self.run, self.progress, self.stop, self.resume, self.plot, self.preview, self.shown, self.finished]
        gr.Timer(_SECONDS).tick(
            self.look, [self.run, self.shown], outputs, trigger_mode="once", concurrency_limit=None, **QUIET
        )
        self.run.input(self.look, [self.run, self.shown], outputs, **QUIET)
        selected = [generate.subject, generate.prompt, tabs]
        generate.redraw(self.finished.change(generate.select, self.finished, selected, **QUIET))

    def open(self) -> Any:
        """Return all runs, with the one that trains now, else the newest, for a page that is opened."""
        names = self.trainer.names()
        return gr.Dropdown(names, value=self.trainer.running() or next(iter(names), None))

    def check(self, files: Any, model: Any, before: Any) -> tuple[str | None, str]:
        """Return a folder with the uploaded photos, and the verdict on each."""
        _forget(before)
        if not files:
            return None, ""
        with told():
            if model not in self.trainer.models:
                raise ConfigError(f"The model {str(model)[:40]!r} cannot be used.", "Choose one of the list.")
            folder = gather([str(file) for file in files], self.private / f"photos-{uuid.uuid4().hex}")
            return str(folder), markup.verdicts(look_at(folder, str(model)))

    def begin(self, photos: Any, *words: Any) -> tuple[Any, None]:
        """Start a training, and show it."""
        with told():
            order = self.trainer.order(Path(photos) if photos else None, *words)
            name = self.trainer.start(order)
            self.desk.make_room(self.trainer.needs(order), self.trainer.running)
        return gr.Dropdown(self.trainer.names(), value=name), None

    def go_on(self, name: Any) -> None:
        """Continue the run that the page shows."""
        with told():
            self.trainer.resume(name)

    def end(self, name: Any) -> None:
        """Stop the run that the page shows; it saves first."""
        with told():
            self.trainer.stop(name)
        gr.Info("Stopping after this step, to save it.", duration=4, title="")

    def look(self, name: Any, shown: Any) -> Sequence[Any]:
        """Show how far a run is, if that changed since the page looked last."""
        names = self.trainer.names()
        if name not in names:
            name = self.trainer.running() or next(iter(names), None)
        if name is None:
            return [gr.skip()] * 8
        with told():
            now = self.trainer.progress(name)
        before, key = shown or (None, None), (now.name, now.state, now.step, now.line, tuple(names))
        if before == key:
            return [gr.skip()] * 8
        was_running = before[0] == now.name and before[1] in ("starting", "training")
        ended = now.name if was_running and now.state == "done" else gr.skip()
        return [gr.Dropdown(names, value=name), *_answers(now), key, ended]


def _answers(now: Progress) -> list[Any]:
    """Return the bar, both buttons, the plot and the preview of a run."""
    rows = markup.loss_rows(now.losses, LOSSES)
    plot = gr.LinePlot(pd.DataFrame(rows, columns=list(_COLUMNS)), visible=len(now.losses) > 1)
    stop, resume = gr.Button(interactive=now.is_running), gr.Button(interactive=now.state in ("stopped", "failed"))
    return [markup.bar(now), stop, resume, plot, markup.preview(now.preview)]


def _forget(folder: Any) -> None:
    """Delete uploaded photos that no training took, when others replace them or the page is closed."""
    if folder:
        shutil.rmtree(str(folder), ignore_errors=True)
