"""The same seed and a checkpoint give the same bits."""

from __future__ import annotations

import pytest
import torch

from echodistill_cli.training.steps import echo_step
from tests.helpers.runs import NewState, checkpoint_of, moved, same, take_steps, trained

each_text_form = pytest.mark.parametrize("form", ["lora", "token", "frozen"])


def test_the_same_seed_gives_the_same_bits_whatever_the_global_generator(new_state: NewState) -> None:
    runs = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        state = new_state(echo__start=2, echo__every=1)
        torch.manual_seed(global_seed + 10)
        runs.append((take_steps(state, 3), trained(state)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


def test_another_seed_gives_another_run(new_state: NewState) -> None:
    first, second = (new_state(run__seed=seed) for seed in (0, 1))
    assert moved(trained(first), second) >= {"teacher", "text", "student", "discriminators"}
    assert take_steps(first, 1) != take_steps(second, 1)


@each_text_form
def test_a_run_resumes_from_a_checkpoint_bit_for_bit(new_state: NewState, form: str) -> None:
    settings = {"text__form": form, "echo__start": 1, "echo__every": 2}
    whole = new_state(**settings)
    take_steps(whole, 2)
    checkpoint = checkpoint_of(whole)
    assert whole.pool
    rest = take_steps(whole, 2)
    resumed = new_state(**settings)
    resumed.load_state_dict(checkpoint)
    assert resumed.step == 2
    assert resumed.pool is not None
    assert take_steps(resumed, 2) == rest
    assert same(trained(whole), trained(resumed))
    assert whole.pool.prompts == resumed.pool.prompts
    assert torch.equal(whole.pool.latents, resumed.pool.latents)
    assert torch.equal(whole.generator.get_state(), resumed.generator.get_state())


def test_the_pool_of_a_checkpoint_lands_on_the_runs_device(new_state: NewState) -> None:
    state = new_state()
    echo_step(state)
    checkpoint = checkpoint_of(state)
    state.pair.device = torch.device("meta")
    state.load_state_dict(checkpoint)
    assert state.pool is not None
    assert state.pool.latents.device.type == "meta"
