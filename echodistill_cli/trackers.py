"""Trackers beside `metrics.jsonl`, through accelerate: TensorBoard and Weights & Biases; none unless asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from echodistill_cli.config.build import config_to_dict
from echodistill_cli.config.schema import Config
from echodistill_cli.config.settings import nearest
from echodistill_cli.errors import ConfigError, EchoDistillError
from echodistill_cli.paths import public_name

TRACKERS = ("tensorboard", "wandb")

Track = Callable[[Mapping[str, float]], None]


def check_trackers(names: Sequence[str]) -> None:
    """See that every tracker of `run.report_to` is known and installed, before anything is loaded for it.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        if name not in TRACKERS:
            near = nearest(name, TRACKERS)
            raise ConfigError(
                f"--report-to {name}: it is one of {', '.join(TRACKERS)}.", f"Did you mean {near}?" if near else None
            )
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--report-to {name}: its package is missing.", f"pip install 'echodistill[{name}]'")


@contextmanager
def tracking(config: Config, folder: Path) -> Iterator[Track]:
    """Give a function that hands one step's metrics (with its "step") to every tracker of `run.report_to`.

    Raises:
        ConfigError: as `check_trackers`.
    """
    names = config.run.report_to
    check_trackers(names)
    if not names:
        yield lambda _metrics: None
        return
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, log_with=list(names), project_dir=folder / "logs")
    try:
        accelerator.init_trackers("echodistill", config=_flat(config))
    except Exception as error:  # each tracker has its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise EchoDistillError(
            f"--report-to {','.join(names)} did not start ({reason}).", "Or leave it out."
        ) from error
    try:
        yield lambda metrics: accelerator.log(dict(metrics), step=int(metrics["step"]))
    finally:
        accelerator.end_training()


def _flat(config: Config) -> dict[str, str | float]:
    """Settings by dotted key, as trackers want them; of paths on this machine only the last part."""
    tables = config_to_dict(config)
    flat = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    return {key: value if isinstance(value, (int, float)) else _public(value) for key, value in flat.items()}


def _public(value: str | list[str]) -> str:
    if isinstance(value, list):
        return ", ".join(map(_public, value))
    return public_name(value)
