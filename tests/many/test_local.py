"""`train-many` on this machine: skip, resume, retry, stop; results are those of `train`; one process per run folder."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from echodistill_cli.errors import ConfigError
from echodistill_cli.many.local import LocalEngine, visible_gpus
from echodistill_cli.runs import open_run
from tests.helpers.commands import Done, command, small_toml
from tests.many.helpers import NAMES, PATIENCE, ROOT, Batch, pid_in
from tests.training.test_interrupts import differences


class Story:
    """Three subjects, two at once. `one` fails, `two` is killed and retried, `three` is stopped; then the rest is done.

    Args:
        batch: the subjects; three has 160 steps, the others 8.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        long = {"train.steps": 160}
        batch.write(*NAMES, one={"critic.identity": "./missing"}, three=long)
        with batch.process("--workers", 2) as watched:
            self.killed = pid_in(watched.until("two: started on"))
            watched.until("two: training 4/8")
            os.kill(self.killed, signal.SIGKILL)
            watched.until("two: done")
            watched.until("three: training 40/160")
            watched.process.send_signal(signal.SIGINT)
            self.code = watched.end()
        self.text = watched.text
        self.rows = {name: batch.attempts(name) for name in NAMES}
        self.results = {name: batch.result(name) for name in NAMES}
        self.checkpoint = open_run(batch.output / "three").list_checkpoints()[-1].name
        batch.write(*NAMES, three=long)
        self.planned = batch("--dry-run", "--json").result["subjects"]
        self.written = self.lora("two").stat().st_mtime_ns
        self.again: Done = batch("--json", "--workers", 2)

    def lora(self, name: str) -> Path:
        """The LoRA file of a subject."""
        return self.batch.output / name / f"{name}.safetensors"


@pytest.fixture(scope="module")
def story(
    tmp_path_factory: pytest.TempPathFactory,
    small_pair: tuple[Path, Path],
    small_backbones: dict[str, Path],
    photo_folder: Path,
) -> Story:
    """See `Story`; it happens once for all tests."""
    folder = tmp_path_factory.mktemp("story")
    toml = small_toml(folder, small_pair, small_backbones, echo__start="off", train__steps=8, run__sample_every=100)
    for name in NAMES:
        shutil.copytree(photo_folder, folder / "photos" / name)
    return Story(Batch(folder, toml))


def test_a_subject_that_fails_is_named_and_not_retried(story: Story) -> None:
    (failed,) = story.rows["one"]
    assert (failed["status"], failed["exit_code"], story.results["one"]) == ("failed", 4, None)
    assert "missing" in failed["error"]
    assert "one: failed" in story.text


def test_a_killed_process_is_retried_from_its_checkpoint(story: Story) -> None:
    killed, retried = story.rows["two"]
    assert (killed["status"], killed["pid"], killed["attempt"]) == ("died", story.killed, 1)
    assert "killed by signal 9" in killed["error"]
    assert (retried["status"], retried["attempt"], retried["steps"]) == ("done", 2, 8)
    assert retried["begun_from"] in (2, 4, 6)
    assert retried["host"] == platform.node()
    assert story.results["two"] == retried
    assert Path(retried["lora"]) == story.lora("two")
    assert story.batch.steps("two") == list(range(1, 9))
    log = (story.batch.output / "logs" / "two.log").read_text()
    assert "died." in log
    assert "continuing its training" in log


def test_ctrl_c_saves_what_runs_before_the_command_ends(story: Story) -> None:
    assert story.code == 130
    assert "Stopped. Not done: 2, of which 1 were running and are saved. The same command continues." in story.text
    (stopped,) = story.rows["three"]
    assert (stopped["status"], story.results["three"]) == ("stopped", None)
    assert story.checkpoint == f"step-{stopped['steps']:06d}"


def test_a_second_call_skips_what_is_finished_and_does_the_rest(story: Story) -> None:
    assert [one["state"] for one in story.planned] == ["new", "finished", f"resumes after {story.checkpoint}"]
    assert story.again.code == 0, story.again.err
    result = story.again.result
    assert result["counts"] == {"done": 2, "was finished": 1}
    assert {name: one["status"] for name, one in result["subjects"].items()} == {
        "one": "done",
        "two": "was finished",
        "three": "done",
    }
    assert result["subjects"]["three"]["begun_from"] == int(story.checkpoint.removeprefix("step-"))
    assert story.lora("two").stat().st_mtime_ns == story.written
    assert len(story.batch.attempts("two")) == 2
    assert story.batch.steps("three") == list(range(1, 161))


def test_the_results_are_to_the_bit_those_of_train(story: Story) -> None:
    single = story.batch.folder / "single"
    arguments = ["--config", story.batch.toml, "--class-name", "dog", "--name", "two", "-o", single, "-q"]
    assert command("train", story.batch.folder / "photos" / "two", *arguments).code == 0
    expected, *states = (
        open_run(folder).load_checkpoint()
        for folder in (single, story.batch.output / "two", story.batch.output / "one")
    )
    for state in states:
        assert differences(*({**one, "settings": {}} for one in (expected, state))) == []
    # The headers differ in the time of the training.
    assert differences(load_file(story.lora("two")), load_file(single / "two.safetensors")) == []


def test_other_settings_are_refused_and_other_photos_are_no_finished_subject(story: Story) -> None:
    refused = story.batch("--rank", 3)
    assert (refused.code, refused.out) == (2, "")
    assert f"{story.batch.manifest}, line 1: " in refused.error
    assert "was made with adapter.rank = 2, not 3" in refused.error
    photo = story.batch.folder / "photos" / "two" / "photo-0.jpg"
    before = photo.read_bytes()
    photo.write_bytes(before + b"more")
    states = [one["state"] for one in story.batch("--dry-run", "--json").result["subjects"]]
    photo.write_bytes(before)
    assert states == ["finished", "resumes after step-000008", "finished"]


def test_a_worker_saves_and_ends_when_the_command_is_killed(batch: Batch) -> None:
    batch.write("one")
    with batch.process("--steps", 1000) as watched:
        process = Path(f"/proc/{pid_in(watched.until('one: started on'))}")
        while not (batch.output / "one" / "metrics.jsonl").exists():
            time.sleep(0.1)
        watched.process.kill()
        watched.end()
    deadline = time.monotonic() + PATIENCE
    while process.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not process.exists()
    run = open_run(batch.output / "one")
    assert run.list_checkpoints()[-1].name == f"step-{batch.steps('one')[-1]:06d}"
    assert not (batch.output / "results.jsonl").exists()


HOLD = """
import sys, time
from pathlib import Path
from echodistill_cli.runs import open_run
with open_run(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(300)
"""


def test_a_second_process_on_a_run_ends_at_once_and_a_kill_frees_the_run(batch: Batch) -> None:
    run = batch.folder / "run"
    train = ["train", batch.folder / "photos" / "one", "--config", batch.toml, "-o", run, "--steps", 1, "-q"]
    assert command(*train).code == 0
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        held = f"{run} is being trained by process {holder.pid} on {platform.node()}. Wait until it ends, or stop it."
        for how in ("--resume", "--overwrite"):
            refused = command(*train, how)
            assert (refused.code, refused.out) == (1, "")
            assert refused.error == f"error: {held}"
            assert "Loading" not in refused.err
    finally:
        holder.kill()
        holder.communicate()
    assert command(*train, "--resume").code == 0


def test_gpus_are_shared_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert visible_gpus() == ("2", "5")
    for share, workers, slots in ((None, None, 2), (0.5, None, 4), (1.0, 3, 3), (0.0, None, 1)):
        assert LocalEngine(tmp_path, workers, share, on_gpu=True).slots == slots
    halves = LocalEngine(tmp_path, None, 0.5, on_gpu=True)
    devices = [halves.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(4)]
    assert devices == ["2", "5", "2", "5"]
    assert "CUDA_VISIBLE_DEVICES" not in LocalEngine(tmp_path, 2, None, on_gpu=False).environment(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == ()
    with pytest.raises(ConfigError, match="a subject cannot use several GPUs"):
        LocalEngine(tmp_path, None, 2.0, on_gpu=True)
