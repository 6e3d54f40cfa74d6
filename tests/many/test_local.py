"""`train-many` on this machine: skip, resume, retry, stop; results are those of `train`; one process per run folder."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from echodistill_cli.many.local import LocalEngine, visible_gpus
from echodistill_cli.runs import open_run
from tests.helpers.commands import command
from tests.many.helpers import ROOT, Batch, pid_in
from tests.training.test_interrupts import differences


def test_one_fails_one_is_killed_and_a_second_call_does_only_the_rest(batch: Batch) -> None:
    # `one` fails while its models load, `two` is killed and not retried, `three` succeeds.
    batch.write("one", "two", "three", one={"critic.identity": "./missing"})
    with batch.process("--retries", 0) as watched:
        watched.until("one: failed")
        process = pid_in(watched.until("two: started on"))
        watched.until("two: training 4/8")
        os.kill(process, signal.SIGKILL)
        assert watched.end() == 1
    (failed,), (killed,), (done,) = (batch.attempts(name) for name in ("one", "two", "three"))
    assert (failed["status"], failed["exit_code"], batch.result("one")) == ("failed", 4, None)
    assert "missing" in failed["error"]
    assert (killed["status"], killed["exit_code"], killed["pid"]) == ("died", 1, process)
    assert "killed by signal 9" in killed["error"]
    assert batch.result("two") is None
    assert (done["status"], done["steps"], done["host"]) == ("done", 8, platform.node())
    assert batch.result("three") == done
    assert Path(done["lora"]).is_file()
    assert "1 done, 1 failed, 1 died" in watched.text or "1 failed, 1 died, 1 done" in watched.text
    assert "continuing" not in (batch.output / "logs" / "two.log").read_text()

    # The same command with the cause of the failure removed: one from the start, two from its checkpoint, three not.
    batch.write("one", "two", "three")
    written = (batch.output / "three" / "three.safetensors").stat().st_mtime_ns
    again = batch("--json")
    assert again.code == 0, again.err
    result = again.result
    assert {name: one["status"] for name, one in result["subjects"].items()} == {
        "one": "done",
        "two": "done",
        "three": "was finished",
    }
    assert result["counts"] == {"done": 2, "was finished": 1}
    assert result["subjects"]["two"]["begun_from"] in (2, 4, 6)
    assert batch.steps("two") == list(range(1, 9))
    assert (batch.output / "three" / "three.safetensors").stat().st_mtime_ns == written
    assert len(batch.attempts("three")) == 1

    # To the bit what `train` makes of the same settings.
    arguments = ["--config", batch.toml, "--class-name", "dog", "--name", "two", "-o", batch.folder / "single", "-q"]
    assert command("train", batch.folder / "photos" / "two", *arguments).code == 0
    for name in ("two", "one"):
        states = [open_run(folder).load_checkpoint() for folder in (batch.output / name, batch.folder / "single")]
        states = [{key: value for key, value in state.items() if key != "settings"} for state in states]
        assert differences(*states) == []
    lora = (batch.output / "two" / "two.safetensors").read_bytes()
    assert lora == (batch.folder / "single" / "two.safetensors").read_bytes()


def test_a_killed_process_is_retried_from_its_checkpoint_and_the_others_go_on(batch: Batch) -> None:
    batch.write("one", "two")
    with batch.process("--workers", 2, "--json") as watched:
        processes = dict(line.split(": started") for line in (watched.until("started"), watched.until("started")))
        watched.until("two: training 4/8")
        os.kill(int(processes["two"].rsplit(" ", 1)[1]), signal.SIGKILL)
        watched.until("two: Its process ended early (killed by signal 9)")
        assert watched.end() == 0, watched.text
    first, second = batch.attempts("two")
    assert [row["status"] for row in (first, second)] == ["died", "done"]
    assert second["attempt"] == 2
    assert second["begun_from"] in (2, 4, 6)
    assert [row["attempt"] for row in batch.attempts("one")] == [1]
    assert batch.steps("two") == list(range(1, 9))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_every_running_subject_before_the_command_ends(
    batch: Batch, number: signal.Signals, code: int
) -> None:
    with batch.process("--workers", 2, "--steps", 100) as watched:
        watched.until("one: training")
        watched.until("two: training")
        watched.process.send_signal(number)
        assert watched.end() == code
    assert "Not done: 3, of which 2 were running and are saved. The same command continues." in watched.text
    for name in ("one", "two"):
        (row,) = batch.attempts(name)
        assert (row["status"], row["exit_code"]) == ("stopped", 143)
        saved = open_run(batch.output / name).list_checkpoints()[-1].name
        assert saved == f"step-{row['steps']:06d}"
    assert not (batch.output / "three").exists()


def test_workers_save_and_end_when_the_command_is_killed(batch: Batch) -> None:
    batch.write("one")
    with batch.process("--steps", 100) as watched:
        process = pid_in(watched.until("one: started on"))
        watched.until("one: training")
        watched.process.kill()
        watched.end()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{process}").exists()
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
            assert (refused.code, refused.out, refused.err) == (1, "", f"error: {held}\n")
    finally:
        holder.kill()
        holder.communicate()
    assert command(*train, "--resume").code == 0


def test_other_settings_or_photos_are_trained_again_or_refused(batch: Batch) -> None:
    batch.write("one")
    assert batch("--steps", 2).code == 0
    planned = [batch(*flags, "--dry-run", "--json").result["subjects"][0]["state"] for flags in
               ((), ("--steps", 2))]  # fmt: skip
    assert planned == ["resumes after step-000002", "finished"]
    refused = batch("--steps", 2, "--rank", 3)
    assert refused.code == 2
    assert f"{batch.manifest}, line 1: " in refused.error
    assert "was made with adapter.rank = 2, not 3" in refused.error
    # The same settings with another photo are no finished subject, and no run to continue.
    photo = batch.folder / "photos" / "one" / "photo-0.jpg"
    photo.write_bytes((batch.folder / "photos" / "one" / "photo-1.jpg").read_bytes() + b"more")
    changed = batch("--steps", 2)
    assert changed.code == 2  # the only subject's own code
    assert "was trained on other photos: the image of photo-0.jpg changed" in batch.attempts("one")[-1]["error"]
    assert json.loads((batch.output / "one" / "result.json").read_text() if batch.result("one") else "{}") == {}


def test_gpus_are_shared_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert visible_gpus() == ("2", "5")
    for share, workers, slots in ((None, None, 2), (0.5, None, 4), (1.0, 3, 3), (0.0, None, 1)):
        engine = LocalEngine(tmp_path, workers, share, on_gpu=True)
        assert engine.slots == slots
    halves = LocalEngine(tmp_path, None, 0.5, on_gpu=True)
    devices = [halves._environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(4)]
    assert devices == ["2", "5", "2", "5"]
    assert "CUDA_VISIBLE_DEVICES" not in LocalEngine(tmp_path, 2, None, on_gpu=False)._environment(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == ()
    with pytest.raises(Exception, match="a subject cannot use several GPUs"):
        LocalEngine(tmp_path, None, 2.0, on_gpu=True)
