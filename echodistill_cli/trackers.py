"""Trackers beside `metrics.jsonl`, through accelerate: TensorBoard and Weights & Biases; none unless asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from echodistill_cli.config import Config
from echodistill_cli.errors import ConfigError
from echodistill_cli.presets import config_to_dict

TRACKERS = ("tensorboard", "wandb")

Track = Callable[[Mapping[str, float]], None]


@contextmanager
def tracking(config: Config, folder: Path) -> Iterator[Track]:
    """Give a function that hands one step's metrics (with its "step") to every tracker of `run.report_to`.

    Raises:
        ConfigError: an unknown tracker, or one whose package is not installed.
    """
    names = config.run.report_to
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"--report-to {name}: it is one of {', '.join(TRACKERS)}.")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--report-to {name}: its package is missing.", f"pip install 'echodistill[{name}]'")
    if not names:
        yield lambda _metrics: None
        return
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, log_with=list(names), project_dir=folder)
    accelerator.init_trackers("echodistill", config=_flat(config))
    try:
        yield lambda metrics: accelerator.log(dict(metrics), step=int(metrics["step"]))
    finally:
        accelerator.end_training()


def _flat(config: Config) -> dict[str, str | float]:
    """Settings by dotted key, as trackers want them; the photos' path stays at home."""
    tables = config_to_dict(config)
    flat = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    del flat["concept.photos"]
    return {key: value if isinstance(value, (int, float)) else str(value) for key, value in flat.items()}
