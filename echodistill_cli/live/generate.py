"""The Generate tab: an image per keystroke, the base model beside it, kept images, files to take away."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, cast

import gradio as gr

from echodistill_cli.errors import EchoDistillError
from echodistill_cli.live import markup
from echodistill_cli.live.desk import GRID, Desk, Waiting
from echodistill_cli.live.guard import MOST_LETTERS, MOST_SEED, MOST_STRENGTH, STEPS
from echodistill_cli.live.studio import Drawing
from echodistill_cli.live.subjects import chosen, take_away

FIRST_SEED = 7
_BASE = "base model"
# Of all handlers: nothing of gradio's own is shown over an image, and no handler is advertised as an API.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
# Of those that take plain values, which the desk checks. Never where a State is read: a browser could then send one.
PLAIN: dict[str, Any] = QUIET | {"preprocess": False}
# Of those that draw: the last key wins, and the desk's own line decides who is served.
DRAWS: dict[str, Any] = PLAIN | {"trigger_mode": "always_last", "concurrency_limit": None}


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Context that shows an error of ours as one line on the page.

    Raises:
        gr.Error: for the page.
    """
    try:
        yield
    except EchoDistillError as error:
        # Gradio shows HTML: a stranger's name could load an image from elsewhere.
        raise gr.Error(escape(str(error), quote=False), title="", print_exception=False) from error


@dataclass
class GenerateTab:
    """The components of the tab, and what they do.

    Attributes:
        desk: serves the wishes.
        private: folder of temporary files, which a browser may read by their names.
    """

    desk: Desk
    private: Path

    def build(self) -> None:
        """Lay the components out; must run inside a `gr.Blocks`."""
        names = list(self.desk.subjects())
        with gr.Row(equal_height=True):
            self.subject = gr.Dropdown(
                names, value=names[0] if names else None, label="Subject", interactive=True, scale=2, min_width=180,
                elem_id="subject",
            )  # fmt: skip
            self.prompt = gr.Textbox(
                label="Prompt", lines=1, max_lines=4, max_length=MOST_LETTERS, autofocus=True, scale=7, min_width=280,
                placeholder="a photo of a dog on the beach", elem_id="prompt",
            )  # fmt: skip
        with gr.Row(equal_height=False):
            with gr.Column(scale=7, min_width=300):
                self._images()
            with gr.Column(scale=4, min_width=280):
                self._controls()
        self.kept = gr.Gallery(
            label="Kept images", columns=6, fit_columns=False, object_fit="contain", height="auto",
            interactive=False, visible=False, buttons=["download", "fullscreen"], elem_id="kept",
        )  # fmt: skip
        self.wishes = [self.subject, self.prompt, self.strength, self.seed, self.steps]
        self.seeds_from = gr.State(FIRST_SEED)
        self._connect()

    def _images(self) -> None:
        with gr.Row(elem_classes="ed-pair"):
            self.picture = gr.HTML(min_width=150, elem_id="picture")
            self.base = gr.HTML(min_width=150, elem_id="base")
        self.note = gr.HTML(elem_id="note")
        self.grid = gr.Gallery(
            label="Four seeds: choose one", columns=GRID, format="png", object_fit="contain", height="auto",
            allow_preview=False, visible=False, buttons=[], interactive=False, elem_id="grid",
        )  # fmt: skip

    def _controls(self) -> None:
        self.strength = gr.Slider(
            0, MOST_STRENGTH, 1, step=0.05, label="Strength: 0 base model, 1 as trained", elem_id="strength"
        )
        with gr.Group(), gr.Row(equal_height=True):
            self.seed = gr.Number(
                FIRST_SEED,
                label="Seed",
                precision=0,
                minimum=0,
                maximum=MOST_SEED - GRID,
                min_width=110,
                elem_id="seed",
            )
            choices = [(str(count or "auto"), count) for count in STEPS]
            self.steps = gr.Radio(choices, value=STEPS[0], label="Steps", scale=3, min_width=200, elem_id="steps")
        self.beside = gr.Checkbox(True, label="Base model beside it, same seed", elem_id="beside")
        with gr.Row():
            self.dice = gr.Button("\N{DIE FACE-5} New seed", size="md", min_width=110, elem_id="dice")
            self.four = gr.Button("Four seeds", size="md", min_width=110, elem_id="four")
        self.keep = gr.Button("Keep this image", variant="primary", size="md", elem_id="keep")
        with gr.Accordion("Files to take away", open=False, elem_id="away") as self.away:
            self.files = gr.File(label="Files", interactive=False, file_count="multiple")
            self.tools = gr.HTML()

    def _connect(self) -> None:
        # Gradio tells `input` of a text box for real keys alone, not for pasted, dictated or suggested words.
        typed = (self.prompt.change, self.strength.input, self.seed.input, self.steps.input, self.beside.input)
        self._then_base(gr.on(list(typed), self.draw, self.inputs, self.outputs, **DRAWS))
        self.redraw(self.subject.input(self.choose, [self.subject, self.prompt], self.prompt, **PLAIN))
        self.redraw(self.dice.click(None, None, self.seed, js="() => Math.floor(Math.random() * 100000)"))
        self.keep.click(self.keep_image, self.wishes, self.kept, **PLAIN)
        self.four.click(self.four_seeds, self.wishes, [self.grid, self.seeds_from], **PLAIN)
        self.redraw(self.grid.select(self.take_seed, self.seeds_from, self.seed, **QUIET))
        gr.on([self.away.expand, self.subject.change], self.take, self.subject, [self.files, self.tools], **PLAIN)

    @property
    def inputs(self) -> list[Any]:
        """What `draw` reads."""
        return [*self.wishes, self.beside]

    @property
    def outputs(self) -> list[Any]:
        """What `draw` shows."""
        return [self.picture, self.base, self.note]

    def redraw(self, event: Any) -> Any:
        """Draw after an event that set a component, which is no input of a person."""
        return self._then_base(event.then(self.draw, self.inputs, self.outputs, **DRAWS))

    def _then_base(self, event: Any) -> Any:
        return event.success(self.draw_base, self.inputs, self.base, **DRAWS)

    def draw(self, name: Any, prompt: Any, strength: Any, seed: Any, steps: Any, beside: Any) -> Iterator[Any]:
        """Show the subject's image; the base model's frame is only cleared here, if it is not wanted."""
        with told():
            wish = self.desk.wish(name, prompt, strength, seed, steps)
            title = str(name) if name and wish.strength else _BASE
            frame = gr.skip() if beside and name else ""
            if not wish.prompt:
                yield markup.empty_figure("Type a prompt to see an image.", title), frame, ""
                return
            for answer in self.desk.draw(wish):
                if isinstance(answer, Waiting):
                    yield gr.skip(), gr.skip(), markup.place_in_line(answer)
                else:
                    yield markup.figure(answer, title), frame, markup.note(answer.notes)

    def draw_base(self, name: Any, prompt: Any, strength: Any, seed: Any, steps: Any, beside: Any) -> Any:
        """Show the base model's image, once the keys rest."""
        with told():
            wish = self.desk.wish(name, prompt, strength, seed, steps)
            if not (beside and name):
                return ""
            if not wish.prompt:
                return markup.empty_figure("", _BASE)
            *_, drawing = self.desk.draw(wish, base=True)
            return markup.figure(cast(Drawing, drawing), _BASE)

    def choose(self, name: Any, prompt: Any) -> str:
        """Return the prompt with the new subject in the place of the one before."""
        with told():
            subjects = self.desk.subjects()
            subject = chosen(subjects, name)
        words = prompt if isinstance(prompt, str) else ""
        if subject is None or not subject.phrase:
            return words
        for other in sorted(subjects.values(), key=lambda one: len(one.phrase), reverse=True):
            if other.phrase and other.phrase in words:
                return words.replace(other.phrase, subject.phrase)
        return words if words.strip() else subject.prompt

    def open(self) -> tuple[Any, ...]:
        """Return the subjects, the first of them, a prompt, and the kept images, for a page that is opened."""
        subjects = self.desk.subjects()
        first = next(iter(subjects.values()), None)
        prompt = first.prompt if first else "a photo of a dog on the beach" if self.desk.studio.model else ""
        return gr.Dropdown(list(subjects), value=first.name if first else None), prompt, self.gallery()

    def select(self, name: Any) -> tuple[Any, Any, Any]:
        """Return the subjects with a new one selected, a prompt for it, and this tab; nothing without a name."""
        if name is None:  # gradio tells so when a page is opened
            return gr.skip(), gr.skip(), gr.skip()
        with told():
            subjects = self.desk.subjects()
            subject = chosen(subjects, name)
        prompt = subject.prompt if subject else ""
        return gr.Dropdown(list(subjects), value=name), prompt, gr.Tabs(selected="generate")

    def gallery(self) -> Any:
        """Return the kept images."""
        kept = self.desk.kept()
        return gr.Gallery([(str(file), file.stem) for file in kept], visible=bool(kept))

    def keep_image(self, *values: Any) -> Any:
        """Write the image that the page shows, and show all that were kept."""
        with told():
            file = self.desk.keep(self.desk.wish(*values))
        gr.Info(f"Kept as {file.name}, with its prompt and settings inside.", duration=3, title="")
        return self.gallery()

    def four_seeds(self, *values: Any) -> tuple[Any, int]:
        """Show images at this seed and the next ones."""
        with told():
            wish = self.desk.wish(*values)
            if not wish.prompt:
                return gr.skip(), wish.seed
            drawing = self.desk.draw_now(wish, count=GRID)
        images = [(image, f"seed {wish.seed + index}") for index, image in enumerate(drawing.images)]
        return gr.Gallery(images, visible=True, selected_index=None), wish.seed

    def take_seed(self, seed: Any, event: gr.SelectData) -> int:
        """Return the seed of an image of the grid."""
        with told():
            index = event.index if isinstance(event.index, int) and 0 <= event.index < GRID else 0
            return replace(self.desk.wish(None, "", 1, seed, 1)).seed + index

    def take(self, name: Any) -> tuple[Any, str]:
        """Return a subject's files, and where other tools want them."""
        with told():
            subject = chosen(self.desk.subjects(), name)
            if subject is None:
                return None, ""
            away = take_away(subject)
        return [str(self._public(file)) for file in away.files], markup.tools(away)

    def _public(self, file: Path) -> Path:
        """Return a second name of a file, in the folder that a browser may read."""
        version = f"{file.resolve()} {file.stat().st_mtime_ns}"
        place = self.private / "files" / hashlib.sha256(os.fsencode(version)).hexdigest()[:16] / file.name
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, place)
            except OSError:  # another disk
                shutil.copyfile(file, place)
        return place
