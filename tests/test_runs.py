"""Run folders: created once, saved atomically, found again, and resumed with the same settings only."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from echodistill_cli import locks
from echodistill_cli.config.build import config_from_dict, config_to_toml
from echodistill_cli.config.schema import Config
from echodistill_cli.errors import ConfigError, EchoDistillError
from echodistill_cli.files import (
    atomically,
    explained,
    host_mark,
    last_part,
    make_folder,
    public_name,
    recover_below,
    remove,
    scratch,
    sha256,
    write_bytes,
    write_text,
)
from echodistill_cli.pipeline import resumed_config
from echodistill_cli.runs import (
    Run,
    check_name,
    check_output,
    create_run,
    newest_run,
    open_run,
    resume_run,
)

DEAD = 2**31 - 1  # no process has this ID
OTHER_HOST = "0123ab"
ROOT = Path(__file__).parents[1]


def config_at(folder: Path, **changes: Any) -> Config:
    """A configuration of a run in `folder`, with changes such as train__steps=5."""
    tables: dict[str, dict[str, Any]] = {"run": {"output": str(folder)}}
    for key, value in changes.items():
        section, name = key.split("__")
        tables.setdefault(section, {})[name] = value
    return config_from_dict(tables)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(config_at(tmp_path / "run", run__keep=2), overwrite=False)


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((3,), float(step)), "pool": None}


def everything_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# --- making and opening -----------------------------------------------------------------------------------------------


def test_a_new_run_holds_its_configuration(run: Run) -> None:
    assert everything_in(run.folder) == {"config.toml", "samples"}
    assert open_run(run.folder).config == run.config


def test_a_run_that_is_there_is_not_overwritten_unasked(run: Run) -> None:
    (run.folder / "result").write_text("precious")
    with pytest.raises(ConfigError, match=r"exists already.*--resume.*--overwrite.*--output"):
        create_run(run.config, overwrite=False)
    assert (run.folder / "result").read_text() == "precious"


def test_overwriting_starts_from_an_empty_folder(run: Run) -> None:
    run.save_checkpoint(1, state(1))
    run.log({"step": 1})
    again = create_run(config_at(run.folder, train__steps=7), overwrite=True)
    assert everything_in(run.folder) == {"config.toml", "samples"}
    assert open_run(again.folder).config.train.steps == 7


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_run_folder_is_never_overwritten(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "config.toml").write_text("[train]\nsteps = 7\n")
    for name in ("mine", "file", "settings"):
        with pytest.raises(ConfigError):
            create_run(config_at(tmp_path / name), overwrite=overwrite)
    assert (tmp_path / "settings" / "config.toml").exists()
    assert (tmp_path / "mine" / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "precious"


def test_a_run_folder_that_holds_the_photos_or_the_working_directory_is_not_overwritten(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = run.folder / "photos"
    photos.mkdir()
    with pytest.raises(ConfigError, match="holds the photos, so it is not overwritten"):
        create_run(config_at(run.folder, concept__photos=str(photos)), overwrite=True)
    monkeypatch.chdir(photos)
    with pytest.raises(ConfigError, match="holds the working directory, so it is not overwritten"):
        create_run(config_at(run.folder, concept__photos=str(run.folder.parent)), overwrite=True)
    assert photos.is_dir()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert create_run(config_at(tmp_path / "empty"), overwrite=False).folder == tmp_path / "empty"


def test_a_folder_without_a_configuration_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run folder: it has no config\.toml"):
        open_run(tmp_path)


def test_the_newest_run_is_the_one_that_was_written_to_last(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no run under"):
        newest_run(tmp_path)
    runs = [create_run(config_at(tmp_path / name), overwrite=False) for name in ("a", "b", "c")]
    for age, made in enumerate((runs[1], runs[0], runs[2])):
        os.utime(made.folder / "config.toml", (1000 - age, 1000 - age))
    assert newest_run(tmp_path).folder.name == "b"
    runs[2].log({"step": 1})
    assert newest_run(tmp_path).folder.name == "c"


def as_killed(folder: Path, moment: str) -> None:
    """Leave of a whole run what a killed process would."""
    if moment == "before its settings":
        for path in folder.iterdir():
            path.unlink() if path.is_file() else shutil.rmtree(path)
        (folder / "samples").mkdir()
        (folder / f".config.toml.{DEAD}.tmp").touch()
        (folder / ".lock").write_text(str(DEAD))
    elif moment == "before its samples":  # by an older version
        shutil.rmtree(folder / "samples")
    elif moment == "settings removed":  # by an older version
        (folder / "config.toml").unlink()
        (folder / "samples" / "step-000000.png").touch()
    elif moment == "moved aside":
        folder.rename(folder.with_name(f".{folder.name}.{DEAD}.old.tmp"))


@pytest.mark.parametrize("moment", ["before its settings", "before its samples", "settings removed", "moved aside"])
def test_a_run_that_was_killed_at_its_start_or_end_can_be_replaced(run: Run, moment: str) -> None:
    as_killed(run.folder, moment)
    again = create_run(config_at(run.folder, train__steps=7), overwrite=True)
    assert everything_in(run.folder.parent) == {"run", "run/config.toml", "run/samples"}
    assert open_run(again.folder).config.train.steps == 7


def test_a_run_that_was_killed_before_its_settings_were_written_is_not_in_the_way(run: Run) -> None:
    as_killed(run.folder, "before its settings")
    create_run(run.config, overwrite=False)
    assert everything_in(run.folder) == {"config.toml", "samples"}


def test_a_run_that_was_killed_before_its_samples_folder_was_made_is_resumed(run: Run) -> None:
    as_killed(run.folder, "before its samples")
    resume_run(run.config).rewind(0)
    assert run.samples.is_dir()


def test_an_old_run_that_was_moved_aside_comes_back(run: Run) -> None:
    as_killed(run.folder, "moved aside")
    assert newest_run(run.folder.parent).folder == run.folder
    as_killed(run.folder, "moved aside")
    assert open_run(run.folder).config == run.config
    as_killed(run.folder, "moved aside")
    with pytest.raises(ConfigError, match="exists already"):
        create_run(run.config, overwrite=False)


def test_a_folder_of_pictures_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="is not a run folder"):
        create_run(config_at(tmp_path), overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_a_run_that_is_being_trained_is_neither_trained_nor_overwritten(run: Run) -> None:
    with run.locked():
        assert (run.folder / ".lock").read_text() == f"{os.getpid()} {platform.node()}"
        message = rf"run is being trained by process {os.getpid()} on {re.escape(platform.node())}\."
        with pytest.raises(EchoDistillError, match=message), run.locked():
            pass
        with pytest.raises(EchoDistillError, match=message):
            create_run(run.config, overwrite=True)
    assert everything_in(run.folder) == {"config.toml", "samples"}
    (run.folder / ".lock").write_text(str(DEAD))  # of a killed process
    with run.locked():
        pass


@pytest.mark.parametrize("is_missing", [True, False], ids=["no fcntl", "no locks on this disk"])
def test_two_trainings_of_a_run_are_told_apart_where_files_cannot_be_locked(
    run: Run, monkeypatch: pytest.MonkeyPatch, is_missing: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "_SETTLING", 0.01)
    monkeypatch.setitem(
        sys.modules, "fcntl", None if is_missing else SimpleNamespace(flock=refuse, LOCK_EX=2, LOCK_NB=4)
    )
    lock = run.folder / ".lock"
    with subprocess.Popen(["sleep", "60"]) as other:
        lock.write_text(f"{other.pid} {platform.node()}")
        message = rf"run is being trained by process {other.pid} on .* \(if it is gone, delete .*\.lock\)"
        with pytest.raises(EchoDistillError, match=message), run.locked():
            pass
        other.kill()
    for text in (f"{DEAD} {platform.node()}", f"{DEAD}", "", "nonsense"):
        lock.write_text(text)
        with run.locked():
            assert lock.read_text() == f"{os.getpid()} {platform.node()}"
        assert not lock.exists()
    lock.write_text("1 elsewhere")
    with pytest.raises(EchoDistillError, match="by process 1 on elsewhere"), run.locked():
        pass
    for path in run.folder.iterdir():
        os.utime(path, (1, 1))
    with run.locked():
        pass


@pytest.mark.parametrize("name", ["../../strange", "/tmp/strange", "..", "a\\b", "a:b", "x" * 223, "Nul.txt"])
@pytest.mark.parametrize("key", ["run__name", "concept__token", "concept__class_name"])
def test_a_run_with_names_that_lead_out_of_a_folder_is_not_opened(tmp_path: Path, key: str, name: str) -> None:
    tmp_path.joinpath("config.toml").write_text(config_to_toml(config_at(tmp_path, **{key: name})), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cannot be used as a file name|is too long for a file"):
        open_run(tmp_path)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was(run: Run) -> None:
    saved = run.save_checkpoint(12, state(12))
    assert saved.name == "step-000012"
    loaded = run.load_checkpoint()
    assert loaded["step"] == 12
    assert torch.equal(loaded["weights"], state(12)["weights"])
    assert loaded["pool"] is None


def test_only_the_newest_checkpoints_are_kept(run: Run) -> None:
    for step in (5, 10, 15, 20):
        run.save_checkpoint(step, state(step))
    assert [path.name for path in run.list_checkpoints()] == ["step-000015", "step-000020"]
    assert run.load_checkpoint()["step"] == 20
    assert run.load_checkpoint(15)["step"] == 15
    with pytest.raises(ConfigError, match=r"no checkpoint of step 10\. Choose one of 15, 20\."):
        run.load_checkpoint(10)


def test_a_step_saved_again_replaces_the_first(run: Run) -> None:
    run.save_checkpoint(5, state(5) | {"weights": torch.zeros(3)})
    run.save_checkpoint(5, state(5))
    assert torch.equal(run.load_checkpoint()["weights"], state(5)["weights"])
    assert len(run.list_checkpoints()) == 1


class Unsavable:
    """Something that cannot be pickled: saving fails in its middle."""

    def __reduce__(self) -> Any:
        raise KeyboardInterrupt


def test_a_checkpoint_that_fails_in_its_middle_leaves_nothing_behind(run: Run) -> None:
    run.save_checkpoint(5, state(5))
    before = everything_in(run.folder)
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(10, state(10) | {"more": Unsavable()})
    with pytest.raises(KeyboardInterrupt):  # of the same step, as the teacher's steps alone have
        run.save_checkpoint(5, state(5) | {"more": Unsavable()})
    assert everything_in(run.folder) == before
    assert run.load_checkpoint()["step"] == 5


def test_without_a_checkpoint_there_is_nothing_to_resume(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"has no checkpoint yet.*train --overwrite"):
        run.load_checkpoint()


def damage_bit(folder: Path) -> None:
    content = bytearray((folder / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "state.pt").write_bytes(content)


def damage_length(folder: Path) -> None:
    content = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(content[: len(content) // 2])


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def remove_state(folder: Path) -> None:
    (folder / "state.pt").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [damage_bit, damage_length, damage_manifest, remove_state, remove_manifest])
def test_a_damaged_checkpoint_is_named_and_the_earlier_one_offered(run: Run, damage: Any) -> None:
    run.save_checkpoint(5, state(5))
    damage(run.save_checkpoint(10, state(10)))
    with pytest.raises(EchoDistillError, match=r"step-000010 is damaged .*--from-step 5"):
        run.load_checkpoint()
    assert run.load_checkpoint(5)["step"] == 5
    damage(run.checkpoints / "step-000005")
    with pytest.raises(EchoDistillError, match="step-000005 is damaged") as caught:
        run.load_checkpoint(5)
    assert "--from-step" not in str(caught.value)


def test_a_checkpoint_runs_no_code_of_its_own(run: Run) -> None:
    saved = run.save_checkpoint(5, state(5) | {"path": Path("x")})  # an object that only unpickling could make
    assert saved.is_dir()
    with pytest.raises(EchoDistillError, match="is damaged"):
        run.load_checkpoint()


def test_checkpoints_of_all_phases_have_their_own_names_in_the_order_of_training(run: Run) -> None:
    run = Run(run.folder, config_at(run.folder, run__keep=9))
    phases = [(0, 10, 0), (0, 20, 0), (7, 20, 0), (1_000_000, 20, 0), (1_000_000, 20, 10)]
    for step, head, back in phases:
        run.save_checkpoint(step, state(step) | {"head_start_step": head, "carry_back_step": back})
    names = [path.name for path in run.list_checkpoints()]
    assert names == [
        *("step-000000-head-000010", "step-000000-head-000020", "step-000007", "step-1000000"),
        "step-1000000-back-000010",
    ]
    assert run.load_checkpoint(0)["head_start_step"] == 20
    assert run.load_checkpoint()["carry_back_step"] == 10
    damage_bit(run.checkpoints / names[1])
    assert run.load_checkpoint(0)["head_start_step"] == 10  # the newest whole one of the step that the remedy names
    run.rewind(0, 10)
    assert [path.name for path in run.list_checkpoints()] == names[:1]


def test_a_checkpoint_between_whose_two_renames_the_process_was_killed_comes_back(run: Run) -> None:
    saved = run.save_checkpoint(5, state(5))
    saved.rename(saved.with_name(f".{saved.name}.{DEAD}.old.tmp"))
    saved.with_name(f".{saved.name}.{DEAD}.tmp").mkdir()
    recover_below(run.folder)
    assert torch.equal(run.load_checkpoint()["weights"], state(5)["weights"])
    assert everything_in(run.checkpoints) == {"step-000005", "step-000005/state.pt", "step-000005/manifest.json"}


def test_a_copy_that_a_person_made_of_a_checkpoint_is_not_one(run: Run) -> None:
    damage_bit(run.save_checkpoint(5, state(5)))
    (run.checkpoints / "step-000001.bak").mkdir()
    (run.checkpoints / "step-000009").touch()
    with pytest.raises(EchoDistillError, match=r"step-000005 is damaged .*train --overwrite"):
        run.load_checkpoint()


@pytest.mark.parametrize("content", ["null", "[]", '"x"', '{"sha256": 1}'])
def test_a_manifest_of_another_form_is_damage(run: Run, content: str) -> None:
    (run.save_checkpoint(5, state(5)) / "manifest.json").write_text(content)
    with pytest.raises(EchoDistillError, match="step-000005 is damaged"):
        run.load_checkpoint()


@pytest.mark.parametrize("forged", [{"family": "../x"}, {"family": ["sd"]}, {"step": "5"}])
def test_a_forged_checkpoint_is_damage(run: Run, forged: dict[str, Any]) -> None:
    run.save_checkpoint(5, state(5) | forged)
    with pytest.raises(EchoDistillError, match="step-000005 is damaged"):
        run.load_checkpoint()


def test_settings_that_were_edited_by_hand_are_not_believed(tmp_path: Path) -> None:
    run = create_run(config_at(tmp_path / "run", adapter__rank=4, train__lr=0.5), overwrite=False)
    run.save_checkpoint(5, state(5))
    text = (run.folder / "config.toml").read_text()
    for changed, message in (
        (text.replace("seed = 0\n", "seed = 3\n"), r"config\.toml has run\.seed = 3, but .* trained with 0\."),
        ("", r"config\.toml has adapter\.rank = 32, but .* trained with 4\."),
    ):
        (run.folder / "config.toml").write_text(changed)
        with pytest.raises(ConfigError, match=message):
            open_run(run.folder).load_checkpoint()
    # What may change by a flag may change by hand too.
    (run.folder / "config.toml").write_text(text.replace("lr = 0.5\n", "lr = 0.25\n"))
    assert open_run(run.folder).config.train.lr == 0.25
    assert open_run(run.folder).load_checkpoint()["step"] == 5


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_are_one_object_per_step(run: Run) -> None:
    assert run.read_metrics() == []
    for step in (1, 2):
        run.log({"step": step, "latent": step / 2})
    assert run.read_metrics() == [{"step": 1, "latent": 0.5}, {"step": 2, "latent": 1.0}]
    assert len(run.metrics_file.read_text().splitlines()) == 2


def test_a_line_that_a_crash_cut_off_is_left_out_and_does_not_spoil_the_next(run: Run) -> None:
    run.log({"step": 1})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 2, "lat')
    assert run.read_metrics() == [{"step": 1}]
    run.rewind(1)
    run.log({"step": 2})
    assert run.read_metrics() == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 2}{"step": 3}\n',
        b"\0" * 40 + b"\n",
        b'{"step": 2, "a": "\xff"}\n',
        b"[2]\n",
        b'{"step": "2"}\n',
        b"[" * 9999,
        b'{"step": 2, "latent": "x"}\n',
        b'{"step": 2, "latent": []}\n',
        b'{"step": 2, "latent": 1e400}\n',
        b'{"step": %s}\n' % (b"9" * 400),
    ],
    ids=["glued", "zeros", "not UTF-8", "no object", "no number", "nested", "text", "list", "infinite", "huge"],
)
def test_a_damaged_line_is_left_out_and_counted(run: Run, damage: bytes) -> None:
    run.log({"step": 1})
    with run.metrics_file.open("ab") as file:
        file.write(damage if damage.endswith(b"\n") else damage + b"\n")
    run.log({"step": 4})
    assert run.read_metrics() == [{"step": 1}, {"step": 4}]
    assert run.rewind(4) == 1
    assert run.rewind(4) == 0
    assert run.read_metrics() == [{"step": 1}, {"step": 4}]


def test_a_resumed_run_forgets_what_it_goes_through_again(run: Run) -> None:
    for step in range(1, 11):
        run.log({"step": step})
    run.save_checkpoint(5, state(5))
    run.save_checkpoint(10, state(10))
    run.rewind(5)
    assert [entry["step"] for entry in run.read_metrics()] == [1, 2, 3, 4, 5]
    assert [path.name for path in run.list_checkpoints()] == ["step-000005"]


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss__latent": 0.5}, r"made with loss.latent = 1.0, not 0.5"),
        ({"adapter__rank": 4}, r"made with adapter.rank = 32, not 4"),
        ({"run__seed": 1}, r"made with run.seed = 0, not 1"),
        ({"concept__token": "ohwx"}, r"made with concept.token = 'sks', not 'ohwx'"),
        ({"echo__start": "off"}, r"made with echo.start = 60, not 'off'"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(run: Run, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resume_run(config_at(run.folder, **changes))
    assert open_run(run.folder).config == run.config


def test_what_does_not_decide_the_result_may_change(run: Run) -> None:
    changed = config_at(run.folder, train__steps=2000, run__keep=5, run__sample_every=7, model__device="cpu")
    resumed = resume_run(changed)
    assert resumed.config == changed
    assert open_run(run.folder).config == run.config  # nothing is written before the run really goes on
    resumed.rewind(0)
    assert open_run(run.folder).config == changed


def test_there_is_nothing_to_resume_where_no_run_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run folder"):
        resume_run(config_at(tmp_path / "none"))


def test_the_configuration_to_go_on_with_is_the_runs_own_with_what_is_named_changed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_run(config_at(run.folder, adapter__rank=4), overwrite=True)
    config = resumed_config({"run.output": str(run.folder), "train.steps": 5})
    assert (config.adapter.rank, config.train.steps, config.output) == (4, 5, run.folder)
    monkeypatch.chdir(run.folder.parent)
    create_run(config_at(Path("runs/other"), adapter__rank=3), overwrite=False)
    assert resumed_config({"train.steps": 6}).adapter.rank == 3
    with pytest.raises(ConfigError, match=r"setting train\.stpes"):
        resumed_config({"train.stpes": 6})


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(run: Run) -> None:
    run.save_checkpoint(5, state(5))
    (run.samples / "step-000005.png").touch()
    before = everything_in(run.folder)
    (run.checkpoints / f".step-000010.{DEAD}.tmp").mkdir()
    (run.checkpoints / f".step-000010.{DEAD}.tmp" / "state.pt").touch()
    (run.samples / f".step-000010.png.{DEAD}.tmp").touch()
    (run.folder / f".metrics.jsonl.{DEAD}.tmp").touch()
    assert [path.name for path in run.list_checkpoints()] == ["step-000005"]
    recover_below(run.folder)
    assert everything_in(run.folder) == before


def test_what_a_live_process_of_another_host_writes_is_not_touched(run: Run) -> None:
    # Its ID says nothing here: there is no such process, or it is another one.
    writing = run.checkpoints / f".step-000010.{DEAD}-{OTHER_HOST}.tmp"
    writing.mkdir(parents=True)
    (writing / "state.pt").touch()
    file = run.folder / f".config.toml.{DEAD}-{OTHER_HOST}.tmp"
    file.touch()
    recover_below(run.folder)
    write_text(run.folder / "config.toml", (run.folder / "config.toml").read_text())
    with pytest.raises(ConfigError, match="exists already"):
        check_output(run.config, overwrite=False)
    assert (writing / "state.pt").exists()
    assert file.exists()


def test_what_a_dead_process_of_another_host_left_is_settled_when_it_is_old(run: Run) -> None:
    hours_ago = time.time() - 7200
    left, growing = (run.folder / f".{name}.{DEAD}-{OTHER_HOST}.tmp" for name in ("left", "growing"))
    for folder in (left, growing):
        folder.mkdir()
        (folder / "part").touch()
    for path in (left / "part", left, growing):
        os.utime(path, (hours_ago, hours_ago))
    recover_below(run.folder)
    assert not left.exists()
    assert growing.exists()
    run.folder.rename(run.folder.with_name(f".{run.folder.name}.{DEAD}-{OTHER_HOST}.old.tmp"))
    assert open_run(run.folder).config == run.config, "an old version comes back at once"


def test_processes_in_one_container_have_one_mark() -> None:
    code = "from echodistill_cli.files import host_mark; print(host_mark())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert other.stdout.strip() == host_mark()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run__name": "a/b"}, r"--name 'a/b' cannot be used as a file name\. Use letters, digits, - and _\."),
        ({"concept__token": "a:b"}, "--token 'a:b' cannot be used as a file name"),
        ({"concept__class_name": " . "}, "--class-name ' . ' cannot be used as a file name"),
        ({"run__name": "None"}, "A1111 cannot load a LoRA named 'None'"),
        ({"run__name": "sks", "text__form": "token"}, r"token would both be sks\.safetensors"),
    ],
)
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    check_name(config_at(tmp_path))
    with pytest.raises(ConfigError, match=message):
        check_name(config_at(tmp_path, **changes))


# --- writing files ----------------------------------------------------------------------------------------------------


def fail_while_writing(path: Path, *, folder: bool = False) -> None:
    with atomically(path) as temporary:
        if folder:
            temporary.mkdir()
        (temporary / "file" if folder else temporary).write_text("half")
        raise RuntimeError


def test_a_file_is_replaced_only_when_the_block_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old ü")
    with pytest.raises(RuntimeError):
        fail_while_writing(path)
    assert path.read_text(encoding="utf-8") == "old ü"
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert everything_in(tmp_path) == {"file"}


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        fail_while_writing(tmp_path / "folder", folder=True)
    assert everything_in(tmp_path) == set()
    with atomically(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "file").touch()
    assert everything_in(tmp_path) == {"folder", "folder/file"}


def test_a_file_that_its_writer_closed_to_others_gets_the_usual_permissions(tmp_path: Path) -> None:
    with atomically(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "file").touch(mode=0o600)
    (tmp_path / "plain").touch()
    assert (tmp_path / "folder" / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_while_it_is_written_a_file_has_another_name_in_the_same_folder(tmp_path: Path) -> None:
    with atomically(tmp_path / "file") as temporary:
        temporary.write_text("x")
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".file.")
        assert not (tmp_path / "file").exists()


def test_a_scratch_folder_of_a_killed_process_is_settled(tmp_path: Path) -> None:
    with scratch(tmp_path / "a.safetensors") as folder:
        (folder / "a.safetensors").touch()
        left = folder.with_name(folder.name.replace(str(os.getpid()), str(DEAD)))
        shutil.copytree(folder, left)
    assert left.exists()
    with scratch(tmp_path / "a.safetensors"):
        assert not left.exists()
    assert everything_in(tmp_path) == set()


def test_a_name_that_is_not_utf_8_is_escaped_in_a_text(tmp_path: Path) -> None:
    write_text(tmp_path / "report.html", "<p>s\udcff.png ключ</p>")  # as Python reads such names of files
    assert (tmp_path / "report.html").read_text("utf-8") == r"<p>s\udcff.png ключ</p>"


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EchoDistillError, match="file could not be written"), atomically(tmp_path / "file"):
        pass


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        ("ENOSPC", "The disk is full"),
        ("EDQUOT", "quota"),
        ("EACCES", "may not write there"),
        ("EROFS", "read-only"),
    ],
)
def test_an_error_of_the_disk_is_one_line_with_its_remedy(tmp_path: Path, number: str, remedy: str) -> None:
    import errno

    code = getattr(errno, number)
    message = f"{tmp_path}/file could not be written.*{remedy}.*--output"
    with pytest.raises(EchoDistillError, match=message), explained(tmp_path / "file"):
        raise OSError(code, os.strerror(code))


def test_a_missing_folder_and_a_file_in_the_way_are_explained(tmp_path: Path) -> None:
    with pytest.raises(EchoDistillError, match="Its folder does not exist"):
        write_text(tmp_path / "none" / "file", "x")
    (tmp_path / "file").touch()
    with pytest.raises(EchoDistillError, match="A file stands where a folder is needed"):
        make_folder(tmp_path / "file" / "folder")
    with pytest.raises(EchoDistillError, match="The name is too long"):
        write_text(tmp_path / ("x" * 300), "x")


def test_metrics_are_plain_json(run: Run) -> None:
    run.log({"step": 1, "loss": 0.25})
    assert json.loads(run.metrics_file.read_text()) == {"step": 1, "loss": 0.25}


def test_a_loss_that_is_not_finite_is_null_in_the_metrics(run: Run) -> None:
    run.log({"step": 1, "denoising": float("nan"), "latent": 0.5})
    line = run.metrics_file.read_text().splitlines()[-1]
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "denoising": None, "latent": 0.5}


# --- paths and hashes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "public"),
    [
        ("/home/me/models/dino", "dino"),
        ("~/models/dino/", "dino"),
        ("./dino", "dino"),
        ("C:\\models\\dino", "dino"),
        ("stabilityai/sd-turbo", "stabilityai/sd-turbo"),
        ("facebook/dino-vits16@refs/pr/1", "facebook/dino-vits16@refs/pr/1"),
        ("mini:clip", "mini:clip"),
        ("a photo of a cat and/or a dog", "a photo of a cat and/or a dog"),
    ],
)
def test_of_a_path_only_its_last_part_is_public(value: str, public: str) -> None:
    assert public_name(value) == public
    assert last_part("stabilityai/sd-turbo") == "sd-turbo"


def test_an_existing_relative_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert public_name("mine/model") == "mine/model"
    (tmp_path / "mine" / "model").mkdir(parents=True)
    assert public_name("mine/model") == "model"


def test_the_hash_of_a_file_is_that_of_its_content(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"abc")
    assert sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("name", ["checkpoints", "export", "samples/inner", "logs"])
def test_a_run_with_a_link_out_of_it_is_refused(tmp_path: Path, name: str) -> None:
    run = create_run(config_at(tmp_path / "run"), overwrite=False)
    (tmp_path / "elsewhere").mkdir()
    (run.folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="leads out of the run"):
        open_run(run.folder)


def test_a_run_below_a_link_and_links_inside_it_are_fine(tmp_path: Path) -> None:
    run = create_run(config_at(tmp_path / "disk" / "run"), overwrite=False)
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    (run.folder / "newest").symlink_to("samples")
    assert open_run(tmp_path / "runs" / "run").config == run.config


def test_a_link_is_removed_without_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "link").symlink_to("private")
    remove(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["private"]
