"""The desk of the page: checks what people wish, lets them wait in line, keeps images.

It knows no page: the tabs only show what it says.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echodistill_cli.data.images import save_new_png
from echodistill_cli.errors import ConfigError
from echodistill_cli.files import make_folder
from echodistill_cli.live.guard import MOST_SEED, MOST_STRENGTH, STEPS, check_number, check_prompt, check_whole
from echodistill_cli.live.studio import Drawing, Studio, Wish
from echodistill_cli.live.subjects import Subject, chosen, find_subjects

GRID = 4  # seeds of the grid
_PATIENCE = 0.25  # seconds that a person waits before the page says so
_REST, _MOST_UNREST = 0.3, 3.0  # seconds without a key before the base model draws, and the longest wait for them
_GONE = 10.0  # seconds without a word, after which a person who waits has left


@dataclass(eq=False)
class _Ticket:
    yields: bool = False
    seen: float = field(default_factory=time.monotonic)
    served: bool = False


class Line:
    """People who wait for the one device, in the order in which they came."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._tickets: list[_Ticket] = []

    def join(self, *, yields: bool = False) -> _Ticket:
        """Return a ticket for the end of the line; `leave` must follow.

        Args:
            yields: whether those who come later and do not yield are served before it.
        """
        ticket = _Ticket(yields)
        with self._change:
            self._tickets.append(ticket)
            self._tickets.sort(key=lambda one: one.yields and not one.served)
        return ticket

    def wait(self, ticket: _Ticket) -> Iterator[int]:
        """Yield how many are before a ticket, when it has waited and each time that changes; end at its turn."""
        told = 0
        while True:
            with self._change:
                self._change.wait_for(lambda: self._before(ticket) == 0, timeout=_PATIENCE)
                before = self._before(ticket)
                ticket.seen, ticket.served = time.monotonic(), before == 0
            if ticket.served:
                return
            if before != told:
                told = before
                yield before

    def leave(self, ticket: _Ticket) -> None:
        """Let the next one in."""
        with self._change:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
            self._change.notify_all()

    def _before(self, ticket: _Ticket) -> int:
        late = time.monotonic() - _GONE
        self._tickets = [one for one in self._tickets if one is ticket or one.served or one.seen > late]
        if ticket not in self._tickets:  # it was thought to have left
            self._tickets.append(ticket)
        return self._tickets.index(ticket)


@dataclass(frozen=True)
class Waiting:
    """A person waits.

    Attributes:
        before: how many are served first.
    """

    before: int


@dataclass
class Desk:
    """Serves the wishes of all people with one studio.

    Attributes:
        studio: draws.
        folder: of the runs, and of the kept images.
        named: runs and LoRA files that the page was started with.
    """

    studio: Studio
    folder: Path
    named: Sequence[Path] = ()
    line: Line = field(default_factory=Line)
    _trains: Callable[[], object] | None = None
    _asked: float = 0.0  # when somebody last wished for a subject
    _subjects: dict[str, Subject] = field(default_factory=dict)

    def subjects(self) -> dict[str, Subject]:
        """Return the subjects that exist now, by name."""
        self._subjects = find_subjects(self.named, self.folder)
        return self._subjects

    def wish(self, name: Any, prompt: Any, strength: Any, seed: Any, steps: Any) -> Wish:
        """Return a wish made of what a browser sent.

        Raises:
            ConfigError: a value is none that the page offers.
        """
        known = self._subjects if name in self._subjects else self.subjects()
        subject = chosen(known, name)
        if check_whole("Steps", steps, min(STEPS), max(STEPS)) not in STEPS:
            raise ConfigError(f"Steps {steps} is none of {', '.join(map(str, STEPS))}.", "Choose another.")
        return Wish(
            subject.path if subject else None,
            check_prompt(prompt),
            check_number("The strength", strength, 0.0, MOST_STRENGTH),
            check_whole("The seed", seed, 0, MOST_SEED - GRID),
            int(steps),
        )

    def draw(self, wish: Wish, *, count: int = 1, base: bool = False) -> Iterator[Waiting | Drawing]:
        """Yield the place in line while others are served, then the images.

        Args:
            wish: with a prompt.
            count: images, at consecutive seeds.
            base: draw with the base model instead, while nobody waits for a subject.

        Raises:
            ConfigError: a training has the device's memory for itself.
            EchoDistillError: any error of `Studio.draw`.
        """
        if self._trains and self._trains():
            raise ConfigError("The training needs the device's memory.", "Images come back when it ends.")
        self._trains = None
        if base:
            self._wait_for_rest()
        else:
            self._asked = time.monotonic()
        ticket = self.line.join(yields=base)
        try:
            for before in self.line.wait(ticket):
                yield Waiting(before)
            drawing = self.studio.draw_base(wish) if base else self.studio.draw(wish, count)
        finally:
            self.line.leave(ticket)
        yield drawing

    def _wait_for_rest(self) -> None:
        """Wait until the keys rest: an image of the base model would only hold up the next key's."""
        latest = time.monotonic() + _MOST_UNREST
        while time.monotonic() < min(latest, self._asked + _REST):
            time.sleep(_REST / 10)

    def draw_now(self, wish: Wish, *, count: int = 1) -> Drawing:
        """Return the images after waiting silently; raises the errors of `draw`."""
        *_, drawing = self.draw(wish, count=count)
        assert isinstance(drawing, Drawing)
        return drawing

    def make_room(self, needed: float | None, trains: Callable[[], object]) -> None:
        """Forget all models and draw nothing during a training, if the device has too little memory for both.

        Args:
            needed: GiB that the training is expected to need; None if that is not known.
            trains: whether the training still runs.
        """
        free = self.studio.free_gib()
        if needed is not None and free is not None and free < needed:
            self.studio.release()
            self._trains = trains

    def keep(self, wish: Wish) -> Path:
        """Write an image as `sample` does, with all that it was made of, and return its file.

        Raises:
            ConfigError: there is no prompt.
            EchoDistillError: the file cannot be written, or any error of `Studio.draw`.
        """
        if not wish.prompt:
            raise ConfigError("There is no image to keep.", "Type a prompt first.")
        drawing = self.draw_now(wish)
        folder = make_folder(self.kept_folder)
        number = len(self.kept())
        while not save_new_png(file := folder / f"{number:04d}_s{wish.seed}.png", drawing.images[0], drawing.texts[0]):
            number += 1
        return file

    @property
    def kept_folder(self) -> Path:
        """The folder of the kept images."""
        return self.folder / "kept"

    def kept(self) -> list[Path]:
        """Return the kept images, newest first."""
        return sorted(self.kept_folder.glob("[0-9]*_s*.png"), reverse=True)


def any_seed() -> int:
    """Return a random seed with few digits, which a person can repeat."""
    return secrets.randbelow(100_000)
