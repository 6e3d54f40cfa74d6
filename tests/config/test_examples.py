"""The example configurations. `python -m tests.config.test_examples` writes examples/train.toml anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w

from echodistill_cli.config.build import build_config, config_to_dict, read_toml
from echodistill_cli.config.families import FAMILIES
from echodistill_cli.config.schema import Config
from echodistill_cli.config.warnings import warnings
from echodistill_cli.models.memory import estimate

EXAMPLES = Path(__file__).parents[2] / "examples"
HEADER = """\
# Every setting of `echodistill train` with its default: echodistill train ./photos --config FILE
#
# Copy this file and uncomment the settings that you change. Flags and --set win over the file, and the file wins over
# the preset of --model and over --vram. The value "off" stands for none. A misspelled key is an error.
"""


def default_toml() -> str:
    """All settings as comments: a description, then the key with its default."""
    return HEADER + "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    values = config_to_dict(Config())
    for section in dataclasses.fields(Config):
        kind = type(getattr(Config(), section.name))
        yield from ("", f"# {kind.__doc__}", f"[{section.name}]")
        for entry in dataclasses.fields(kind):
            assignment = tomli_w.dumps({entry.name: values[section.name][entry.name]})
            one_line = " ".join(assignment.split()).replace("[ ", "[").replace(", ]", "]")
            yield from ("", f"# {entry.metadata['about']}", f"#{one_line}")


def test_the_example_file_holds_every_setting_with_its_default() -> None:
    assert (EXAMPLES / "train.toml").read_text(encoding="utf-8") == default_toml()


def test_the_example_file_changes_nothing_and_uncommented_gives_the_defaults(tmp_path: Path) -> None:
    for preset in ("sd-turbo", "sdxl-turbo", "mini"):
        assert build_config(preset, EXAMPLES / "train.toml") == build_config(preset)
    lines = (EXAMPLES / "train.toml").read_text(encoding="utf-8").splitlines()
    uncommented = [line.removeprefix("#") for line in lines if not line.startswith(("# ", "#\n")) and line != "#"]
    (tmp_path / "all.toml").write_text("\n".join(uncommented), encoding="utf-8")
    assert read_toml(tmp_path / "all.toml") == config_to_dict(Config())


CARDS = {"sd-turbo-8gb": 8, "sd-turbo-16gb": 16, "sdxl-turbo-16gb": 16, "sdxl-turbo-24gb": 24}


@pytest.mark.parametrize(("name", "gigabytes"), CARDS.items())
def test_the_file_for_a_card_fits_it_and_changes_nothing_of_the_method(name: str, gigabytes: int) -> None:
    config = build_config(toml_file=EXAMPLES / f"{name}.toml", overrides={"concept.class_name": "dog"})
    assert list(warnings(config)) == []
    family = "sdxl" if name.startswith("sdxl") else "sd"
    expected = estimate(config, FAMILIES[family], half=True).total
    assert expected <= gigabytes * 1e9 / 2**30 - 0.4  # what a desktop takes
    assert f"{expected:.1f} GiB" in (EXAMPLES / f"{name}.toml").read_text(encoding="utf-8")
    preset = config_to_dict(build_config(f"{family}-turbo"))
    changed = {
        f"{section}.{key}"
        for section, table in config_to_dict(config).items()
        for key, value in table.items()
        if value != preset[section][key]
    }
    memory = {"model.precision", "model.decoder", "model.offload", "train.batch_size", "critic.discriminators"}
    assert changed - {"concept.class_name"} <= memory | {"train.gradient_checkpointing"}


if __name__ == "__main__":
    (EXAMPLES / "train.toml").write_text(default_toml(), encoding="utf-8")
