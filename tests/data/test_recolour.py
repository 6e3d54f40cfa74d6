"""Views with the subject in another colour: which, where, and what the prompt says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from echodistill_cli.data.photos import Photo
from echodistill_cli.data.recolour import COLOURS, recoloured, tinted, tinted_latents, without_colour
from echodistill_cli.data.views import View, prompt_for, real_views
from echodistill_cli.diffusion.pair import ModelPair
from tests.helpers.drawn_subjects import SUBJECT, DrawnSubject
from tests.helpers.runs import seeded


def as_photos(pictures: list[DrawnSubject], *, masks: bool) -> list[Photo]:
    whole = (0, 0, 64, 64)
    return [
        Photo(Path(f"{index}.png"), Image.fromarray(p.image), Image.fromarray(p.mask) if masks else None, None, whole)
        for index, p in enumerate(pictures)
    ]


def as_views(photos: list[Photo], count: int = 20) -> list[View]:
    return real_views(photos, resolution=64, count=count, generator=seeded())


def test_a_share_of_the_views_is_tinted_each_colour_as_often_and_the_others_stay(
    mini_pair: ModelPair, backpacks: list[DrawnSubject]
) -> None:
    photos = as_photos(backpacks, masks=True)
    views = as_views(photos)
    some = recoloured(views, photos, 0.6, SUBJECT, mini_pair, seeded())
    changed = [(before, after) for before, after in zip(views, some, strict=True) if after.colour]
    assert sorted(after.colour for _, after in changed) == sorted([*COLOURS] * 2)
    assert all(not torch.equal(before.image, after.image) for before, after in changed)
    assert all(before is after for before, after in zip(views, some, strict=True) if not after.colour)
    again = recoloured(views, photos, 0.6, SUBJECT, mini_pair, seeded())
    assert all(torch.equal(one.image, other.image) for one, other in zip(some, again, strict=True))
    assert recoloured(views, photos, 0.0, SUBJECT, mini_pair, seeded()) == views


def test_only_what_a_photos_own_mask_covers_is_tinted(mini_pair: ModelPair, backpacks: list[DrawnSubject]) -> None:
    photos = as_photos(backpacks, masks=True)
    views = as_views(photos, len(photos))
    for picture, before, after in zip(
        backpacks, views, recoloured(views, photos, 1.0, SUBJECT, mini_pair, seeded()), strict=True
    ):
        background, subject = (torch.from_numpy(picture.mask == value) for value in (0, 255))
        torch.testing.assert_close(after.image[:, background], before.image[:, background])
        assert (after.image - before.image)[:, subject].abs().mean() > 0.1


def test_an_empty_canvas_stays_empty(mini_pair: ModelPair, backpacks: list[DrawnSubject]) -> None:
    photos = as_photos(backpacks, masks=False)
    whole = as_views(photos, 1)[0]
    half = torch.ones(1, 64, 64)
    half[:, :, :32] = 0
    view = View(whole.image * half, half, "very small", None, 0)
    (tinted_view,) = recoloured([view], photos, 1.0, SUBJECT, mini_pair, seeded())
    assert tinted_view.image[:, :, :32].abs().max() == 0
    assert not torch.equal(tinted_view.image, view.image)


def test_a_tint_keeps_dark_and_bright() -> None:
    greys = torch.tensor([-1.0, 0.2, 1.0]).expand(3, 1, 3)
    black, middle, white = tinted(greys, (255, 0, 51)).unbind(dim=2)
    torch.testing.assert_close(black, -torch.ones(3, 1))
    torch.testing.assert_close(middle, torch.tensor([[1.0], [-1.0], [-0.6]]))
    torch.testing.assert_close(white, torch.ones(3, 1))


@pytest.mark.parametrize(
    ("caption", "prompt"),
    [
        ("a photo of a sks dog on a bed", "a photo of a red sks dog on a bed"),
        ("on a bed", "a photo of a red sks dog, on a bed"),
    ],
)
def test_a_prompt_names_the_colour(caption: str, prompt: str) -> None:
    nothing = torch.empty(0)
    assert prompt_for(View(nothing, nothing, "", caption, 0, colour="red"), "sks dog", seeded()) == prompt
    assert " red sks dog" in prompt_for(View(nothing, nothing, "", None, 0, colour="red"), "sks dog", seeded())


@pytest.mark.parametrize(
    ("prompt", "plain", "colour"),
    [
        ("a red sks dog in the snow", "a sks dog in the snow", "red"),
        ("A Blue sks dog, far away", "a sks dog, far away", "blue"),
        ("my green sks dog", "my sks dog", "green"),
        ("a sks dog on pink fabric", "a sks dog on pink fabric", None),
        ("a red dog", "a red dog", None),
        ("a tired sks dog", "a tired sks dog", None),
    ],
)
def test_a_prompt_loses_the_colour_of_the_subject_alone(prompt: str, plain: str, colour: str | None) -> None:
    assert without_colour(prompt, "sks dog") == (plain, colour)


def test_a_prompt_without_its_colour_has_the_right_article() -> None:
    assert without_colour("a red olis owl", "olis owl") == ("an olis owl", "red")


def test_pictures_are_tinted_where_the_subject_is_and_only_those_with_a_colour(
    mini_pair: ModelPair, backpacks: list[DrawnSubject]
) -> None:
    pictures = torch.stack([torch.from_numpy(p.image.copy()).permute(2, 0, 1) for p in backpacks[:2]])
    latents = mini_pair.codec.encode(pictures / 127.5 - 1)
    kept, blue = tinted_latents(latents, [None, "blue"], SUBJECT, mini_pair, seeded())
    assert torch.equal(kept, latents[0])
    before, after = mini_pair.codec.decode(torch.stack([latents[1], blue]))
    background, subject = (torch.from_numpy(backpacks[1].mask == value) for value in (0, 255))
    assert (after - before)[:, subject].abs().mean() > 5 * (after - before)[:, background].abs().mean()
    assert (after[2] - after[0])[subject].mean() > 0.3
