"""The mini world's training: the student's losses, a run that goes on where it stopped, blur, and the second vendor."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.diffusion.sampling import teacher_x0
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.models.sources import embedded_folder
from examples.mini_world import matching, student
from examples.mini_world.augment import gaussian_blur
from examples.mini_world.matching import MatchedStage
from examples.mini_world.restore import restore
from examples.mini_world.runner import Budget, run_stage
from examples.mini_world.score import malformed_sheets
from examples.mini_world.student import StudentStage, relativistic

CAPTIONS = ["a photo of a dog in the snow", "a red frog", "a teapot on the beach", "one robot"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with the embedded teacher and four pairs of noise and latents."""
    folder = tmp_path_factory.mktemp("work")
    restore(embedded_folder("mini:student").parent, folder)
    from examples.mini_world.tokenizer import open_tokenizer

    ids = open_tokenizer(folder)(CAPTIONS, padding="max_length", truncation=True, return_tensors="np").input_ids
    noise, latents = np.random.default_rng(0).standard_normal((2, len(CAPTIONS), 4, 16, 16)).astype(np.float16)
    (folder / "pairs-12").mkdir()
    np.savez(folder / "pairs-12" / "pairs-000.npz", noise=noise, latents=latents, ids=ids)
    (folder / "latents-12").mkdir()
    np.savez(folder / "latents-12" / "scenes-000.npz", latents=latents[::-1], captions=CAPTIONS[::-1])
    return folder


def stage_of(work: Path) -> StudentStage:
    return StudentStage(work, 12, "cpu", batch_size=2, regression_samples=2)


def test_the_relativistic_loss_of_hand_made_scores() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0])
    assert float(relativistic(real, fake)) == pytest.approx((np.log1p(np.exp(-2)) + np.log(2)) / 2)
    assert float(relativistic(fake, real)) == pytest.approx((np.log1p(np.exp(2)) + np.log(2)) / 2)


def test_the_students_image_is_renoised_with_the_noise_that_it_was_drawn_from(work: Path) -> None:
    stage = stage_of(work)
    seen: list[tuple[Tensor, ...]] = []
    original = stage._alignment

    def record(drawn: Tensor, noise: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        seen.append((drawn, noise, timesteps, conditioning.hidden, original(drawn, noise, timesteps, conditioning)))
        return seen[-1][-1]

    stage._alignment = record  # type: ignore[method-assign]
    stage.loss(np.random.default_rng(3), samples=2)
    ((drawn, noise, timesteps, hidden, loss),) = seen
    rows = np.random.default_rng(3).integers(0, len(CAPTIONS), 2)
    assert torch.equal(noise, stage.pairs.noise[torch.from_numpy(rows)].float())
    # By hand, for the one image of the batch that is aligned.
    alpha_bar = stage.teacher.schedule.alphas_cumprod[timesteps[:1]].view(-1, 1, 1, 1)
    noisy = alpha_bar.sqrt() * drawn[:1].detach().float() + (1 - alpha_bar).sqrt() * noise[:1]
    asked = Conditioning(hidden[:1])
    with torch.no_grad():
        target = teacher_x0(stage.teacher.denoiser, noisy, timesteps[:1], asked, stage.teacher.null, student.GUIDANCE)
    by_hand = 0.5 * (drawn[:1].float() - target).square().mean() * alpha_bar.squeeze()
    assert float(loss.detach()) == pytest.approx(float(by_hand.detach()), rel=0.05)  # bfloat16


def test_the_critic_leads_before_it_pulls_and_pulls_by_its_share(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "CRITIC_HEAD_START", 2)
    monkeypatch.setattr(student, "LARGEST_WEIGHT", 1e9)
    stage, rng = stage_of(work), np.random.default_rng(0)
    assert set(stage.loss(rng, samples=0)[1]) == {"pairs"}
    assert int(stage.critic_updates) == 0
    figures = [stage.loss(rng, samples=2)[1] for _ in range(3)]
    assert ["weight" in one for one in figures] == [False, False, True]
    # The weighted loss moves an image by half as much as the regression does.
    target, drawn = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    drawn.requires_grad_(True)
    regression = (drawn - target).square().mean()
    weighted, _ = stage._adversarial(target, drawn, regression)
    norms = [float(torch.autograd.grad(loss, drawn, retain_graph=True)[0].norm()) for loss in (weighted, regression)]
    assert norms[0] == pytest.approx(0.5 * norms[1], rel=1e-3)
    assert all(weight.grad is None for weight in stage.critic.parameters())


def test_a_students_run_that_was_stopped_ends_as_one_that_was_not(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student, "CRITIC_HEAD_START", 1)
    monkeypatch.setattr(StudentStage, "report", lambda *_: {})  # draws a sheet for people
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run_stage(stage_of(work), whole, Budget(samples=8), seed=5)
    run_stage(stage_of(work), parted, Budget(samples=4), seed=5)
    shutil.copytree(parted, tmp_path / "half")
    run_stage(stage_of(work), parted, Budget(samples=4), seed=6)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    once, twice, half = (
        torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, parted, tmp_path / "half")
    )
    assert int(once["network"]["critic_updates"]) == 3  # of four updates the first is regression alone
    assert once["more"]["critic"]["state"][0]["step"] == 3
    for kind in ("network", "average"):
        assert all(torch.equal(twice[kind][key], value) for key, value in once[kind].items())
    assert not torch.equal(once["network"]["critic.layers.0.weight"], half["network"]["critic.layers.0.weight"])


def test_a_student_that_draws_as_its_teacher_does_is_not_moved(work: Path) -> None:
    stage, rng = MatchedStage(work, 12, "cpu", batch_size=2, guidance=1.0), np.random.default_rng(0)
    drawn = torch.randn(2, 4, 16, 16, requires_grad=True)
    conditioning = stage.teacher.encode(stage.pairs.token_ids[:2])
    loss, away = stage._matching(rng, drawn, conditioning)
    assert float(loss.detach()) == away == 0


def test_matching_moves_an_image_along_the_difference_of_both_scores(work: Path) -> None:
    stage = MatchedStage(work, 12, "cpu", batch_size=2)
    drawn = torch.randn(2, 4, 16, 16, requires_grad=True)
    conditioning = stage.teacher.encode(stage.pairs.token_ids[:2])
    torch.manual_seed(4)
    loss, _ = stage._matching(np.random.default_rng(0), drawn, conditioning)
    (gradient,) = torch.autograd.grad(loss, drawn)
    # By hand: the same noise and timesteps, the teacher with and without guidance (the fake score begins unguided).
    torch.manual_seed(4)
    timesteps = stage._timesteps(np.random.default_rng(0))
    alpha_bar = stage.teacher.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = alpha_bar.sqrt() * drawn.detach() + (1 - alpha_bar).sqrt() * torch.randn_like(drawn)
    x0 = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for text in (conditioning, stage.teacher.null.expand(2)):
            velocity = stage.teacher.unet(noisy, timesteps, text.hidden).sample.float()
            x0.append(alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * velocity)
    likelier = x0[1] + student.GUIDANCE * (x0[0] - x0[1])
    away = (drawn.detach() - likelier).abs().mean(dim=(1, 2, 3), keepdim=True)
    by_hand = (x0[0] - likelier) / away / drawn.numel()
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), by_hand.flatten(), dim=0) > 0.99  # bfloat16
    assert float(gradient.norm()) == pytest.approx(float(by_hand.norm()), rel=0.05)


def test_renders_of_a_pair_show_what_the_pair_does(work: Path) -> None:
    stage = MatchedStage(work, 12, "cpu", batch_size=2)
    *_, conditioning, renders = stage._rows(np.random.default_rng(0))
    rows = np.random.default_rng(0).integers(0, len(CAPTIONS), 2)
    # The latents of the pairs, in reverse order, stand for renders of the same captions.
    assert torch.equal(renders, stage.pairs.latents[rows].float())
    assert torch.equal(conditioning.hidden, stage.teacher.encode(stage.pairs.token_ids[rows]).hidden)


def test_the_fake_score_learns_the_students_images_ahead_of_it_and_alone(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "FAKE_HEAD_START", 3)
    stage, rng = MatchedStage(work, 12, "cpu", batch_size=2), np.random.default_rng(0)
    before = [weight.detach().clone() for weight in stage.student.parameters()]
    loss, figures = stage.loss(rng, samples=0)
    assert int(stage.fake_updates) == 3 + matching.FAKE_UPDATES
    loss.backward()
    assert all(weight.grad is None for weight in (*stage.fake.parameters(), *stage.teacher.unet.parameters()))
    assert any(weight.grad is not None for weight in stage.student.parameters())
    assert all(map(torch.equal, before, stage.student.parameters()))
    assert {"pairs", "matching", "fake", "critic"} <= set(figures)
    stage.loss(rng, samples=2)
    assert int(stage.fake_updates) == 3 + 2 * matching.FAKE_UPDATES


def test_sheets_to_count_malformed_subjects_number_every_image(mini_pair: ModelPair, tmp_path: Path) -> None:
    files = malformed_sheets(mini_pair, tmp_path / "sheets", count=54)
    assert [file.name for file in files] == ["student-001.png", "student-051.png"]
    with Image.open(files[0]) as whole, Image.open(files[1]) as rest:
        assert whole.width == rest.width == 10 * 192 + 9 * 2  # images of 64 pixels, enlarged
        assert whole.height == 5 * (rest.height + 2) - 2
        pixels = np.asarray(rest)
    lefts = range(0, 4 * 194, 194)
    assert (pixels[:, 4 * 194 :] == 255).all()  # four images on the second sheet
    assert all(pixels[:192, left : left + 192].std() > 10 for left in lefts)
    assert all((pixels[192:, left : left + 192] < 100).any() for left in lefts)  # a caption


def test_a_blur_keeps_a_plain_field_and_spreads_a_point_by_its_sigma() -> None:
    assert gaussian_blur(torch.full((1, 3, 16, 16), 0.3), 2.0).sub(0.3).abs().max() < 1e-6
    point = torch.zeros(1, 1, 33, 33)
    point[..., 16, 16] = 1
    spread = gaussian_blur(point, 2.0)[0, 0]
    offsets = torch.arange(-16, 17).float()
    assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
    assert float((spread.sum(dim=0) * offsets**2).sum()) == pytest.approx(4, rel=0.05)
