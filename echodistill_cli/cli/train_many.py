"""`train-many`: train every subject of a manifest, with a table of all while they run."""

from __future__ import annotations

import functools
import re
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from echodistill_cli import pipeline
from echodistill_cli.cli.options import (
    LOSSES_AND_ECHO,
    RUN,
    Json,
    Quiet,
    bool_option,
    echo_setting,
    naming_flags,
    quiet_libraries,
    value_option,
    with_flags,
    with_settings,
)
from echodistill_cli.cli.progress import phase_of
from echodistill_cli.cli.show import print_table, say_to, stderr_console
from echodistill_cli.cli.train import MODELS, Vram
from echodistill_cli.config.build import build_config
from echodistill_cli.config.work import CARRY_BACK, HEAD_START, JOINT
from echodistill_cli.errors import ConfigError

ON = "where to train: local, ray (a cluster that runs here, or this machine), ray://HOST:PORT"
On = Annotated[str, value_option("ENGINE", f"{ON} [dim]\\[local][/dim]", panel=RUN, show_default=False)]
Workers = Annotated[
    int | None, value_option("N", "subjects at once; unset: one per GPU, or one on a CPU", panel=RUN, min=1)
]
Retries = Annotated[int, value_option("N", "how often to retry a subject whose process was killed", panel=RUN, min=0)]
Gpus = Annotated[
    float | None, value_option("X", "GPUs that a subject takes, such as 0.5; unset: 1 where there are GPUs", panel=RUN)
]
Storage = Annotated[str | None, value_option("URL", "also keep every run there, such as s3://bucket/runs", panel=RUN)]


@with_flags
def train_many(
    manifest: Annotated[
        Path, typer.Argument(metavar="MANIFEST", help=".csv, .jsonl or .toml with a row per subject", readable=False)
    ],
    model: Annotated[str | None, value_option("MODEL", f"student: {MODELS} [dim]\\[sd-turbo][/dim]")] = None,
    config_file: Annotated[Path | None, value_option("FILE", "TOML file with settings", "--config")] = None,
    settings: Annotated[
        list[str] | None, value_option("KEY=VALUE", "any setting, such as train.target_steps=5; repeatable", "--set")
    ] = None,
    vram: Vram = None,
    run_output: Annotated[
        Path, value_option("DIR", "folder of all run folders, DIR/NAME each", "--output", "-o", panel=RUN)
    ] = Path("runs"),
    run_name: Annotated[str | None, typer.Option("--name", hidden=True)] = None,
    on: On = "local",
    workers: Workers = None,
    gpus_per_subject: Gpus = None,
    retries: Retries = 2,
    shard: Annotated[
        str, value_option("I/N", "train every N-th row only, from row I, counted from 0: 0/4 to 3/4", panel=RUN)
    ] = "0/1",
    store: Storage = None,
    echo: Annotated[
        bool | None,
        bool_option("--echo/--no-echo", "check the student's images; then train the teacher from it", LOSSES_AND_ECHO),
    ] = None,
    dry_run: Annotated[bool, bool_option("--dry-run", "check everything; load and write nothing")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    *,
    flags: Mapping[str, Any],
) -> None:
    """Learn every subject of a manifest. A second call skips what is finished and resumes the rest."""
    flags = flags if model is None else {**flags, "model.student": model}
    overrides = with_settings(flags, settings or ())
    overrides |= {} if run_name is None else {"run.name": run_name}
    for key in ("run.name", "run.output", "concept.photos"):
        if key in overrides:
            remedy = "Use --output for the folder of all, and the columns photos and name for each."
            raise ConfigError(f"{key} differs between subjects.", remedy)
    model = overrides.pop("model.student", None)
    build = functools.partial(build_config, model, config_file)
    with naming_flags(flags):
        overrides |= echo_setting(echo, overrides, flags, lambda: build(overrides))
        config = build(overrides)
    quiet_libraries(offline=config.model.offline, quiet=quiet)
    request = pipeline.ManyRequest(
        manifest,
        run_output,
        model,
        config_file,
        overrides,
        pipeline.EngineRequest(on, workers, gpus_per_subject, retries),
        parse_shard(shard),
        store or "",
        vram or "",
    )
    console = stderr_console()
    if dry_run:
        plan = pipeline.plan_many(request, on_message=say_to(console, quiet=quiet))
        print_table({"subjects": [one.to_dict() for one in plan]}, plan_table(plan), as_json=as_json)
        return
    with ManyProgress(console, quiet=quiet) as progress:
        result = pipeline.train_many(request, on_event=progress.on_event, on_message=progress.on_message)
    print_table(result.to_dict(), result_table(result), as_json=as_json)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def parse_shard(text: str) -> tuple[int, int]:
    """Return index and count of a shard such as 0/4.

    Raises:
        ConfigError: it is not of this form.
    """
    if not (match := re.fullmatch(r"(\d+)/(\d+)", text)):
        raise ConfigError(f"--shard {text} is not I/N.", "Write 0/4 for the first of four shards.")
    return int(match[1]), int(match[2])


def plan_table(plan: tuple[pipeline.PlannedSubject, ...]) -> RenderableType:
    """A row per subject, with what would become of it."""
    table = Table("subject", "class", "photos", "steps", "state", "run folder", box=None, pad_edge=False)
    for one in plan:
        photos = "" if one.photos is None else str(one.photos)
        table.add_row(Text(one.name), Text(one.class_name or ""), photos, str(one.steps), one.state, Text(one.output))
    return Group(table, Text(), Text("Nothing was loaded or written."))


_STYLES = {"done": "green", "was finished": "green", "failed": "red", "died": "red", "stopped": "yellow"}


def result_table(result: pipeline.Many) -> RenderableType:
    """A row per subject with its LoRA file or its error, then their number by status."""
    table = Table("subject", "status", "steps", "", box=None, pad_edge=False)
    for name, outcome in result.outcomes.items():
        status = Text(outcome.status, _STYLES[outcome.status])
        table.add_row(Text(name), status, str(outcome.steps), Text(outcome.lora or outcome.error))
    return Group(
        table, Text(), Text(f"{counted(result.to_dict()['counts'])}. Every attempt: {result.output}/results.jsonl")
    )


def counted(counts: Mapping[str, int]) -> str:
    """Return numbers by what they count, such as "3 done, 1 failed"."""
    return ", ".join(f"{number} {what}" for what, number in counts.items() if number) or "none"


_QUARTERS = 4  # plain lines per phase of a subject, without a terminal
_MANY = 50  # subjects above which their steps are not printed as lines
_ORDER = (HEAD_START, JOINT, CARRY_BACK, "starting", "failed", "died", "stopped", "waiting", "done")


class _Shown:
    """What the table shows of a subject.

    Args:
        lengths: steps of each phase by its name.
    """

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self.lengths, self.state, self.error = lengths, "waiting", ""
        self.step = self.first_step = 0
        self.began = 0.0

    @property
    def steps(self) -> int:
        """Steps of the phase."""
        return self.lengths.get(self.state, 0)

    def take(self, metrics: Mapping[str, float]) -> None:
        """Note a finished step of any phase."""
        phase, self.step = phase_of(metrics)
        if phase != self.state:
            self.state, self.first_step = phase, self.step - 1
            self.began = time.monotonic() - metrics.get("step_seconds", 0.0)

    def left(self) -> str:
        """Return the time left of the phase; "" outside of one."""
        done = self.step - self.first_step
        if not self.steps or done < 1:
            return ""
        return duration((time.monotonic() - self.began) / done * (self.steps - self.step))

    def row(self, name: str) -> tuple[Text, ...]:
        """Return the cells of the table."""
        step = f"{self.step}/{self.steps}" if self.steps else ""
        state = Text(self.state, _STYLES.get(self.state, ""))
        return Text(name), state, Text(step), Text(self.left()), Text(self.error, "dim", no_wrap=True)


class ManyProgress:
    """Context that shows the state of every subject.

    On a terminal it is a live table, elsewhere a line per change.

    Args:
        console: of stderr.
        quiet: show nothing.
    """

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self.console, self.quiet = console, quiet
        self.on_message = say_to(console, quiet=quiet)
        self.subjects: dict[str, _Shown] = {}
        self.live: Live | None = None

    def __enter__(self) -> ManyProgress:
        if self.console.is_terminal and not self.quiet:
            self.live = Live(get_renderable=self.table, console=self.console, transient=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live and self.live.is_started:
            self.live.stop()

    def on_event(self, event: pipeline.Event) -> None:
        """Note an event, and show it."""
        if event.kind == "waiting":
            self.subjects[event.name] = _Shown(event.data)
            return
        if self.live and not self.live.is_started:
            self.live.start()
        shown = self.subjects[event.name]
        if event.kind == "step":
            shown.take(event.data)
        elif event.kind == "begin":
            shown.state, shown.error = "starting", ""
        elif event.kind in ("retry", "end"):
            shown.state, shown.step = "waiting" if event.kind == "retry" else event.data["status"], 0
            shown.state = "done" if shown.state == "was finished" else shown.state
            shown.error = event.data["error"]
        if not self.live and (line := self._line(event, shown)):
            self.on_message(line)

    def table(self) -> RenderableType:
        """A row per subject, as many as fit, those that run first; then their number by state."""
        room = max(self.console.height - 4, 1)
        names = list(self.subjects)
        if len(names) > room:
            names.sort(key=lambda name: _ORDER.index(self.subjects[name].state))
        table = Table("subject", "state", "step", "left", "", box=None, pad_edge=False)
        for name in names[:room]:
            table.add_row(*self.subjects[name].row(name))
        return Group(table, Text(self.counts(), "bold"))

    def counts(self) -> str:
        """Return how many subjects are in which state."""
        counts = Counter(shown.state for shown in self.subjects.values())
        return counted({state: counts[state] for state in reversed(_ORDER)})

    def _line(self, event: pipeline.Event, shown: _Shown) -> str:
        if event.kind == "begin":
            return f"{event.name}: started on {event.data['host']}, process {event.data['pid']}"
        if event.kind == "retry":
            return f"{event.name}: {event.data['error']} Trying again."
        if event.kind == "end":
            seconds = f" in {duration(event.data['seconds'])}" if event.data["status"] == "done" else ""
            reason = f": {shown.error}" if shown.error else ""
            return f"{event.name}: {event.data['status']}{seconds}{reason} ({self.counts()})"
        is_quarter = shown.steps and shown.step % max(1, shown.steps // _QUARTERS) == 0
        if event.kind == "step" and is_quarter and len(self.subjects) <= _MANY:
            return f"{event.name}: {shown.state} {shown.step}/{shown.steps}, {shown.left()} left"
        return ""


def duration(seconds: float) -> str:
    """Return seconds in words, such as "3 min"."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
