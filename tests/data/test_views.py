"""Views: their geometry, balance and determinism; prompts: their grammar."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from echodistill_cli.data.photos import Photo
from echodistill_cli.data.prompts import SCENES, TEMPLATES, scene_prompt, with_class, with_subject
from echodistill_cli.data.views import (
    BACKGROUND_WEIGHT,
    SMALL_FRAMINGS,
    ZOOMED_FRAMINGS,
    View,
    latent_masks,
    prompt_for,
    real_views,
    teacher_views,
)
from tests.helpers.runs import seeded

SIDE = 48
SUBJECT = "sks dog"


def photo(index: int = 0, mask: Image.Image | None = None, caption: str | None = None) -> Photo:
    """A picture that is brighter to the right and never mid-grey; its green value tells which photo it is."""
    ramp = np.zeros((64, 96, 3), dtype=np.uint8)
    ramp[..., 0] = np.linspace(150, 250, 96)
    ramp[..., 1] = 10 * index
    return Photo(Path(f"{index}.png"), Image.fromarray(ramp), mask, caption, (16, 0, 80, 64))


def left_half() -> Image.Image:
    mask = Image.new("L", (96, 64))
    mask.paste(255, (0, 0, 48, 64))
    return mask


def some_teacher_views(count: int = 200, seed: int = 0, photos: list[Photo] | None = None) -> list[View]:
    chosen = [photo(index) for index in range(5)] if photos is None else photos
    return teacher_views(chosen, resolution=SIDE, count=count, generator=seeded(seed))


def is_mirrored(image: Tensor, mask: Tensor) -> bool:
    columns = mask[0].bool().any(dim=0).nonzero().flatten()
    red = image[0, mask[0].bool().any(dim=1)].mean(dim=0)
    return bool(red[columns[0]] > red[columns[-1]])


@pytest.mark.parametrize("make", [teacher_views, real_views])
def test_views_have_the_promised_shapes_ranges_and_types(make: Callable[..., list[View]]) -> None:
    for view in make([photo(0), photo(1, left_half())], resolution=SIDE, count=40, generator=seeded()):
        assert view.image.shape == (3, SIDE, SIDE)
        assert view.mask.shape == (1, SIDE, SIDE)
        assert view.image.dtype == view.mask.dtype == torch.float32
        assert view.image.abs().max() <= 1
        assert view.mask.min() >= 0
        assert view.mask.max() <= 1


@pytest.mark.parametrize("make", [teacher_views, real_views])
def test_the_same_seed_gives_bit_identical_views_and_another_gives_others(make: Callable[..., list[View]]) -> None:
    photos = [photo(index) for index in range(3)]
    first, second, other = (make(photos, resolution=SIDE, count=20, generator=seeded(seed)) for seed in (7, 7, 8))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.image, two.image)
        assert torch.equal(one.mask, two.mask)
        assert (one.framing, one.photo) == (two.framing, two.photo)
    assert any(not torch.equal(one.image, two.image) for one, two in zip(first, other, strict=True))


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    some_teacher_views(10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("make", [teacher_views, real_views])
@pytest.mark.parametrize("count", [0, 2, 5, 13])
def test_every_photo_is_used_equally_often_give_or_take_one(make: Callable[..., list[View]], count: int) -> None:
    photos = [photo(index) for index in range(5)]
    views = make(photos, resolution=16, count=count, generator=seeded())
    uses = Counter(dict.fromkeys(range(5), 0))
    uses.update(view.photo for view in views)
    assert len(views) == count
    assert max(uses.values()) - min(uses.values()) <= 1


@pytest.mark.parametrize("make", [teacher_views, real_views])
def test_a_view_tells_its_photo_and_carries_its_caption(make: Callable[..., list[View]]) -> None:
    photos = [photo(index, caption=f"number {index}") for index in range(5)]
    for view in make(photos, resolution=SIDE, count=15, generator=seeded()):
        green = (view.image[1][view.mask[0] > 0] + 1).mean() * 127.5
        assert round(float(green) / 10) == view.photo
        assert view.caption == f"number {view.photo}"


def test_views_of_no_photos_are_refused() -> None:
    with pytest.raises(ValueError, match="no photos"):
        some_teacher_views(1, photos=[])
    assert some_teacher_views(0, photos=[]) == []


def test_a_pasted_photo_is_a_square_whose_mask_is_exactly_where_it_lies() -> None:
    pasted = [view for view in some_teacher_views() if view.mask.min() == 0]
    assert pasted
    for view in pasted:
        inside = view.mask[0].bool()
        rows, columns = inside.any(dim=1), inside.any(dim=0)
        assert rows.sum() == columns.sum()
        assert inside.sum() == rows.sum() * columns.sum()
        assert torch.all(view.image[:, ~inside] == 0)
        assert torch.all(view.image[0, inside] > 0)
        assert 1 / 3 - 0.02 <= float(view.mask.mean()) ** 0.5 < 1


def test_the_framing_agrees_with_the_scale() -> None:
    views = some_teacher_views()
    for view in views:
        scale = float(view.mask.mean()) ** 0.5
        if view.framing in SMALL_FRAMINGS:
            assert scale < 0.6
        elif view.framing == "":
            assert scale >= 0.6
        else:
            assert view.framing in ZOOMED_FRAMINGS
            assert scale == 1
    assert {view.framing for view in views} == {"", *SMALL_FRAMINGS, *ZOOMED_FRAMINGS}


def test_two_thirds_are_pasted() -> None:
    views = some_teacher_views(600)
    assert abs(sum(view.framing not in ZOOMED_FRAMINGS for view in views) / len(views) - 0.66) < 0.06


@pytest.mark.parametrize("make", [teacher_views, real_views])
def test_no_view_is_mirrored_so_that_writing_stays_readable(make: Callable[..., list[View]]) -> None:
    views = make([photo()], resolution=SIDE, count=200, generator=seeded())
    assert not any(is_mirrored(view.image, view.mask) for view in views)
    assert is_mirrored(views[0].image.flip(-1), views[0].mask.flip(-1))


def test_pasted_scales_and_places_cover_the_canvas() -> None:
    pasted = [view for view in some_teacher_views(600) if view.framing not in ZOOMED_FRAMINGS]
    scales = torch.tensor([float(view.mask.mean()) ** 0.5 for view in pasted])
    assert abs(float(scales.mean()) - 2 / 3) < 0.03
    assert torch.stack([view.mask for view in pasted]).amax(dim=0).min() == 1


@pytest.mark.parametrize(
    ("make", "low", "high", "skip"), [(teacher_views, 1.2, 1.4, 0), (real_views, 1.0, 1.15, 1)], ids=["teacher", "real"]
)
def test_the_zoom_is_within_its_bounds(make: Callable[..., list[View]], low: float, high: float, skip: int) -> None:
    views = make([photo()], resolution=SIDE, count=100, generator=seeded())[skip:]
    span = 64 / 95 * 100 / 127.5  # how much red rises over the crop
    zooms = [
        span * (SIDE - 1) / SIDE / float((view.image[0, :, -1] - view.image[0, :, 0]).abs().mean())
        for view in views
        if view.framing in ZOOMED_FRAMINGS or make is real_views
    ]
    assert low - 0.05 < min(zooms)
    assert max(zooms) < high + 0.05
    assert max(zooms) - min(zooms) > 0.1


@pytest.mark.parametrize("make", [teacher_views, real_views])
def test_the_background_counts_a_tenth_and_the_mask_lies_on_the_subject(make: Callable[..., list[View]]) -> None:
    for view in make([photo(0, left_half())], resolution=SIDE, count=60, generator=seeded()):
        weights = view.mask[view.mask > 0]
        assert float(weights.min()) == pytest.approx(BACKGROUND_WEIGHT)
        assert weights.max() == 1
        subject, background = view.mask[0] > 0.9, (view.mask[0] > 0) & (view.mask[0] < 0.2)
        assert view.image[0][subject].mean() < view.image[0][background].mean()


def test_the_first_real_views_are_the_plain_crops_in_order() -> None:
    photos = [photo(index) for index in range(4)]
    views = real_views(photos, resolution=64, count=9, generator=seeded())
    for index, view in enumerate(views[:4]):
        crop = np.asarray(photos[index].image.crop(photos[index].crop), dtype=np.float32) / 127.5 - 1
        assert view.photo == index
        assert torch.allclose(view.image, torch.from_numpy(crop).permute(2, 0, 1))
    assert all(view.framing == "" and view.mask.min() == 1 for view in views)
    assert [view.photo for view in real_views(photos, resolution=64, count=2, generator=seeded())] == [0, 1]


def test_reducing_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    views = real_views(
        [Photo(Path("a"), Image.fromarray(stripes), None, None, (0, 0, 64, 64))],
        resolution=16,
        count=1,
        generator=seeded(),
    )
    assert views[0].image[:, 2:-2, 2:-2].abs().max() < 0.15


def view(framing: str = "", caption: str | None = None) -> View:
    return View(torch.zeros(3, 1, 1), torch.ones(1, 1, 1), framing, caption, 0)


@pytest.mark.parametrize("framing", ["", *SMALL_FRAMINGS, *ZOOMED_FRAMINGS])
def test_a_prompt_names_the_subject_once_and_the_framing_last(framing: str) -> None:
    generator = seeded()
    prompts = {prompt_for(view(framing), SUBJECT, generator) for _ in range(300)}
    for prompt in prompts:
        assert prompt.count(SUBJECT) == 1
        assert "{" not in prompt
        assert "}" not in prompt
        assert prompt.endswith(f", {framing}") if framing else "," not in prompt
        assert not (framing and re.search("cropped|close-up", prompt))
    assert len(prompts) == (len(TEMPLATES) if not framing else len(TEMPLATES) - 4)


def test_prompts_are_drawn_from_the_given_generator() -> None:
    first, second = (
        [prompt_for(view(), SUBJECT, generator) for _ in range(20)] for generator in (seeded(1), seeded(1))
    )
    assert first == second


@pytest.mark.parametrize(
    ("caption", "framing", "prompt"),
    [
        ("a SKS dog on a sofa", "", "a SKS dog on a sofa"),
        ("sks, asleep", "far away", "sks, asleep, far away"),
        ("lying on a sofa", "", "a photo of a sks dog, lying on a sofa"),
        ("tasksheet beside it", "close up", "a photo of a sks dog, tasksheet beside it, close up"),
        ("odd {} braces", "", "a photo of a sks dog, odd {} braces"),
    ],
)
def test_a_caption_with_the_token_stands_as_it_is_and_another_follows_the_subject(
    caption: str, framing: str, prompt: str
) -> None:
    assert prompt_for(view(framing, caption), SUBJECT, seeded()) == prompt


@pytest.mark.parametrize(
    ("subject", "article"),
    [
        *(
            (subject, "a")
            for subject in ("dog", "sks owl", "unicorn", "uniform", "used car", "one-eyed cat", "European")
        ),
        *((subject, "an") for subject in ("owl", "Apple tree", "umbrella", "ice cream")),
    ],
)
def test_the_article_suits_the_subject(subject: str, article: str) -> None:
    assert with_subject("a photo of a {}", subject) == f"a photo of {article} {subject}"
    assert with_subject("a {} in the snow", subject) == f"{article} {subject} in the snow"
    assert with_subject("a photo of the {}", subject) == f"a photo of the {subject}"


def test_templates_and_scene_prompts_are_distinct_and_have_one_place_for_the_subject() -> None:
    for texts, least in ((TEMPLATES, 20), (SCENES, 40)):
        assert len(texts) >= least
        assert len(set(texts)) == len(texts)
        assert all(text.count("{}") == 1 and text == text.strip() for text in texts)
        assert all(re.match("(a|an) ", text) for text in texts)


def test_scene_prompts_go_round() -> None:
    count = len(SCENES)
    assert len({scene_prompt(SUBJECT, index) for index in range(count)}) == count
    assert scene_prompt(SUBJECT, count + 3) == scene_prompt(SUBJECT, 3)
    assert scene_prompt("owl", 0) == "an owl on a windowsill"
    assert scene_prompt("owl", 3, ("a {} at home", "the {} abroad")) == "the owl abroad"


def test_latents_beside_the_canvas_do_not_count_and_the_subjects_mask_is_not_eroded() -> None:
    masks = torch.zeros(1, 1, 64, 64)
    masks[..., 12:56, 8:48] = 1.0  # rows 1.5 to 7 of 8, columns 1 to 6
    masks[..., 32:56, 8:48] = BACKGROUND_WEIGHT
    expected = torch.zeros(8, 8)
    expected[3:4, 2:5] = 1.0  # rows 2 to 6 and columns 1 to 5 are whole; one cell of each side is left out
    expected[4:6, 2:5] = BACKGROUND_WEIGHT
    torch.testing.assert_close(latent_masks(masks, 8)[0, 0], expected)
    whole = torch.rand(1, 1, 64, 64, generator=seeded()).clamp(min=BACKGROUND_WEIGHT)
    torch.testing.assert_close(latent_masks(whole, 8), torch.nn.functional.avg_pool2d(whole, 8))


@pytest.mark.parametrize(
    ("prompt", "subject", "class_name", "expected"),
    [
        ("a photo of a sks owl", "sks owl", "owl", "a photo of an owl"),
        ("An sks owl on a sofa", "sks owl", "owl", "An owl on a sofa"),
        ("my sks dog beside a sks dog", "sks dog", "dog", "my dog beside a dog"),
        ("a photo of an xyz dog", "xyz dog", "dog", "a photo of a dog"),
        ("a sks doghouse", "sks dog", "dog", "a sks doghouse"),
        ("a {} sks dog", "sks dog", "dog", "a {} dog"),
    ],
)
def test_the_class_takes_the_place_of_the_subject_with_its_article(
    prompt: str, subject: str, class_name: str, expected: str
) -> None:
    assert with_class(prompt, subject, class_name) == expected
