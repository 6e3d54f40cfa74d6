"""What the page shows is what `sample` writes: the same pixels, from one set of base weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from echodistill_cli.errors import ConfigError
from echodistill_cli.live.studio import Studio, Wish
from echodistill_cli.outputs.requests import ExportRequest, SampleRequest
from echodistill_cli.pipeline import export, sample
from tests.helpers.commands import trained_run

Pair = tuple[Path, Path]
Backbones = dict[str, Path]


@pytest.fixture(scope="module", params=["lora", "token"])
def run(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    small_pair: Pair,
    small_backbones: Backbones,
    photo_folder: Path,
) -> Path:
    """A run of two steps at a high learning rate: its images differ from the base model's."""
    folder = tmp_path_factory.mktemp(request.param)
    return trained_run(folder, small_pair, small_backbones, photo_folder, text__form=request.param)


def studio(**fields: object) -> Studio:
    return Studio(on_message=lambda _line: None, **fields)  # type: ignore[arg-type]


def pixels(images: object) -> list[np.ndarray]:
    return [np.asarray(image) for image in images]  # type: ignore[attr-defined]


def test_an_image_of_any_strength_is_pixel_for_pixel_that_of_sample(run: Path) -> None:
    here = studio()
    for strength in (1.0, 2.0, 0.0, 0.7, 1.0):  # in an order in which a strength could leave a trace
        for steps in (1, 2):
            drawing = here.draw(Wish(run, "a sks dog on the beach", strength, seed=7, steps=steps), count=2)
            request = SampleRequest(
                ["a sks dog on the beach"], count=2, seed=7, lora=run, lora_scale=strength, steps=steps
            )
            expected = list(sample(request))
            assert all(map(np.array_equal, pixels(drawing.images), pixels(one.image for one in expected)))
            assert [dict(texts) for texts in drawing.texts] == [dict(one.texts) for one in expected]


def test_the_base_model_beside_it_is_that_of_compare(run: Path) -> None:
    wish = Wish(run, "a sks dog on the beach", seed=3)
    here = studio()
    subject, base = here.draw(wish), here.draw_base(wish)
    (expected,) = sample(SampleRequest([wish.prompt], seed=3, lora=run, compare=True))
    assert np.array_equal(np.asarray(base.images[0]), np.asarray(expected.base))
    assert not np.array_equal(np.asarray(base.images[0]), np.asarray(subject.images[0]))


def test_subjects_share_the_base_models_tensors_and_do_not_change_each_other(
    run: Path, tmp_path: Path, small_pair: Pair, small_backbones: Backbones, photo_folder: Path
) -> None:
    other = trained_run(tmp_path, small_pair, small_backbones, photo_folder, run__seed=5)
    here = studio()
    before = here.draw(Wish(run, "a sks dog", seed=1))
    second = here.draw(Wish(other, "a sks dog", seed=1))
    again = here.draw(Wish(run, "a sks dog", seed=1))
    assert np.array_equal(np.asarray(before.images[0]), np.asarray(again.images[0]))
    assert not np.array_equal(np.asarray(before.images[0]), np.asarray(second.images[0]))
    (own,) = sample(SampleRequest(["a sks dog"], seed=1, lora=other))
    assert np.array_equal(np.asarray(second.images[0]), np.asarray(own.image))
    assert here._base is not None
    base = {id(tensor) for tensor in here._base[1].student.unet.parameters()}
    for fork in here._forks.values():
        frozen = [tensor for name, tensor in fork.generator.pair.student.unet.named_parameters() if "lora" not in name]
        assert {id(tensor) for tensor in frozen} == base


def test_a_run_that_was_trained_again_is_loaded_again(run: Path, tmp_path: Path) -> None:
    import os
    import shutil

    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    here = studio()
    first = here.draw(Wish(copy, "a sks dog"))
    (lora,) = copy.glob("sks-dog.safetensors")
    shutil.copy(copy / "teacher" / "sks-dog-teacher.safetensors", lora)
    os.utime(lora, (2e9, 2e9))
    second = here.draw(Wish(copy, "a sks dog"))
    assert not np.array_equal(np.asarray(first.images[0]), np.asarray(second.images[0]))


def test_without_a_subject_the_named_model_draws_and_without_a_model_the_error_says_what_to_do() -> None:
    drawing = studio(model="mini").draw(Wish(None, "a dog on the beach", seed=2))
    assert drawing.images[0].size == (64, 64)
    assert drawing.texts[0]["lora"] == ""
    with pytest.raises(ConfigError, match=r"There is no subject yet\. Train one, or start the page with --model mini"):
        studio().draw(Wish(None, "a dog"))


def test_a_prompt_without_the_token_is_told(run: Path) -> None:
    here = studio()
    assert any("without the token 'sks'" in line for line in here.draw(Wish(run, "a dog")).notes)
    assert not here.draw(Wish(run, "a dog", strength=0.0)).notes


def test_a_cpu_draws_with_exported_graphs_only_at_strength_1_and_only_while_they_are_new(run: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs pip install '.[onnx]'")
    if not export(ExportRequest(run, layouts=("onnx",), overwrite=True)).files:
        pytest.fail("no graphs were written")
    here = studio()
    with_graphs = here.draw(Wish(run, "a sks dog", seed=4))
    (expected,) = sample(SampleRequest(["a sks dog"], seed=4, lora=run, backend="onnx"))
    assert np.array_equal(np.asarray(with_graphs.images[0]), np.asarray(expected.image))
    (half,) = sample(SampleRequest(["a sks dog"], seed=4, lora=run, lora_scale=0.5))
    assert np.array_equal(np.asarray(here.draw(Wish(run, "a sks dog", 0.5, 4)).images[0]), np.asarray(half.image))
