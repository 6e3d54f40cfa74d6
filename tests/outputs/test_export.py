"""What `export` writes draws the pictures of the run, in whatever form: LoRA files, merged folders, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from echodistill_cli.config.schema import ModelConfig
from echodistill_cli.data.images import png_bytes
from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.diffusion.sampling import sample_latents, seeded_noise
from echodistill_cli.diffusion.schedule import trailing_timesteps
from echodistill_cli.errors import ConfigError, EchoDistillError, ModelError
from echodistill_cli.lora.inspect import inspect_file
from echodistill_cli.lora.read import read_lora
from echodistill_cli.lora.safetensors_io import write_safetensors
from echodistill_cli.lora.tensors import LoraWeights, bundled_tensors, kohya_tensors
from echodistill_cli.models.adapters import trainable_parameters
from echodistill_cli.models.load import load_pair
from echodistill_cli.outputs.artifact import TrainingRecord, find
from echodistill_cli.outputs.card import model_card
from echodistill_cli.runs import Run, create_run
from echodistill_cli.training.state import TrainingState, build_state
from tests.helpers.original_layout import build_sd2_pair, sd2_state, sdxl_state
from tests.helpers.random_models import write_distillation
from tests.helpers.runs import export_files, small_config, small_photos, write_loras

Pair = tuple[Path, Path]
SEED = 7
CLOSE = 1e-4  # of pictures in [0, 1]


@dataclass(frozen=True)
class Case:
    """A run whose adapters are random and strong, and the pair that it was made with."""

    run: Run
    state: TrainingState
    pair: Pair
    word: str

    @property
    def prompt(self) -> str:
        return f"a photo of a {self.word} dog on the beach"

    def picture(self, role: str = "student") -> np.ndarray:
        """What the run draws for its prompt."""
        with self.state.at_export_scale():
            return draw(self.state.pair, self.prompt, role)


@pytest.fixture(scope="module")
def sd2_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return build_sd2_pair(tmp_path_factory.mktemp("sd2"))


@pytest.fixture(scope="module")
def make_case(
    sd2_pair: Pair,
    small_sdxl_pair: Pair,
    small_backbones: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Case]:
    """Builds each kind of run once: family "sd" or "sdxl", and LoRA on the text side or a learned word."""
    made: dict[tuple[str, str, str], Case] = {}

    def make(family: str, text: str = "lora", word: str = "sks") -> Case:
        key = family, text, word
        if key not in made:
            pair = sd2_pair if family == "sd" else small_sdxl_pair
            changes = {
                "text__form": text,
                "concept__token": word,
                "adapter__alpha": 6.0,
                "adapter__strength": 0.5,
                "adapter__targets": "attention-conv",
            }
            plain = {"critic__discriminators": (), "critic__identity": "none", "loss__adversarial": 0.0}
            output = str(tmp_path_factory.mktemp("runs") / "sks-dog")
            config = small_config(
                pair, small_backbones, **changes, **plain, loss__identity=0.0, run__output=output, run__name="sks-dog"
            )
            state = build_state(config, small_photos())
            _strengthen(state)
            run = create_run(config, overwrite=False)
            run.save_checkpoint(3, state.state_dict())
            made[key] = Case(run, state, pair, word)
        return made[key]

    return make


def _strengthen(state: TrainingState) -> None:
    torch.manual_seed(3)
    modules = (state.pair.student.unet, state.pair.teacher.unet, *state.pair.encoder.encoders)
    parameters = [parameter for module in modules for parameter in trainable_parameters(module)]
    for parameter in [*parameters, *(state.token.vectors if state.token else ())]:
        strength = 0.1 if parameter.dim() == 4 else 0.3  # a kernel has nine times the weights, whose rounding adds up
        parameter.data.add_(strength * torch.randn_like(parameter))


def draw(pair: ModelPair, prompt: str, role: Any = "student") -> np.ndarray:
    """A picture [64, 64, 3] in [0, 1], unrounded, by our own sampler in one step."""
    conditioning = pair.encoder.encode([prompt])
    noise = seeded_noise([SEED], (4, 8, 8))
    null = pair.encoder.encode_null()
    with torch.no_grad():
        latents = sample_latents(pair.role(role), noise, conditioning, null, steps=1, guidance_scale=0.0)
        image = pair.codec.decode(latents)[0]
    return (image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


def draw_stock(pipeline: Any, prompt: str) -> np.ndarray:
    """The same picture by a stock pipeline with the scheduler that it has."""
    pipeline.set_progress_bar_config(disable=True)
    latents = seeded_noise([SEED], (4, 8, 8))
    settings: dict[str, Any] = {"latents": latents, "height": 64, "width": 64, "output_type": "np"}
    return np.asarray(pipeline(prompt, num_inference_steps=1, guidance_scale=0.0, **settings).images[0])


def stock(case: Case) -> Any:
    """The stock pipeline of the student's folder, trailing."""
    kind = StableDiffusionPipeline if case.state.pair.family == "sd" else StableDiffusionXLPipeline
    pipeline = kind.from_pretrained(case.pair[0])
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    return pipeline


def load(student: Path, **changes: Any) -> ModelPair:
    common: dict[str, Any] = {"resolution": 64, "device": "cpu", "precision": "fp32", "offline": True}
    return load_pair(ModelConfig(student=str(student), **common | changes), teacher=False)


KINDS = [("sd", "lora", "sks"), ("sd", "token", "sks"), ("sdxl", "lora", "sks"), ("sdxl", "token", "sks")]
every_kind = pytest.mark.parametrize(("family", "text", "word"), KINDS, ids=["-".join(kind[:2]) for kind in KINDS])


@every_kind
def test_every_form_draws_the_picture_of_the_run(
    make_case: Callable[..., Case], family: str, text: str, word: str, tmp_path: Path
) -> None:
    case = make_case(family, text, word)
    ours = case.picture()
    assert np.abs(ours - draw_stock(stock(case), case.prompt)).mean() > 0.01  # what was learned shows
    layouts = ("kohya", "diffusers", "pipeline", "checkpoint")
    files = export_files(case.run.folder, layouts=layouts, output=tmp_path, dtype="fp32")
    kohya, diffusers, folder, checkpoint = files[:4]
    assert (len(files) == 5) == (text == "token")
    for file in (kohya, diffusers):
        assert np.abs(draw_with_lora(case, file, files[4:]) - ours).max() < CLOSE, file.name
    kind = StableDiffusionPipeline if family == "sd" else StableDiffusionXLPipeline
    merged = kind.from_pretrained(folder)
    assert merged.scheduler.config.timestep_spacing == "trailing"
    assert np.abs(draw_stock(merged, case.prompt) - ours).max() < CLOSE
    assert np.abs(draw(load(folder), case.prompt) - ours).max() < CLOSE
    single = load(checkpoint, single_file_config=str(case.pair[0]))
    assert np.abs(draw(single, case.prompt) - ours).max() < CLOSE
    from_file = kind.from_single_file(str(checkpoint), config=str(case.pair[0]), local_files_only=True)
    from_file.scheduler = merged.scheduler
    assert np.abs(draw_stock(from_file, case.prompt) - ours).max() < CLOSE


def draw_with_lora(case: Case, file: Path, token: list[Path]) -> np.ndarray:
    """By a stock pipeline with a LoRA file, and the word's file if there is one, loaded in the stock way."""
    pipeline, prompt = stock(case), case.prompt
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    for path in token:
        vectors = load_file(path)
        word = f"<{case.word}>"  # diffusers takes no word that the tokenizer knows already
        prompt = prompt.replace(case.word, word)
        for key, which in zip(vectors, ("", "_2"), strict=False):
            key = {"": "clip_l", "_2": "clip_g"}[which] if len(vectors) > 1 else key
            encoder, tokenizer = getattr(pipeline, f"text_encoder{which}"), getattr(pipeline, f"tokenizer{which}")
            pipeline.load_textual_inversion(vectors[key], token=word, text_encoder=encoder, tokenizer=tokenizer)
            getattr(encoder, "text_model", encoder).eos_token_id = tokenizer.eos_token_id
    return draw_stock(pipeline, prompt)


# new words, the teacher, precision


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_new_word_becomes_a_row_of_the_merged_vocabulary(
    make_case: Callable[..., Case], family: str, tmp_path: Path
) -> None:
    case = make_case(family, "token", "zwx")
    ours = case.picture()
    (folder,) = export_files(case.run.folder, layouts=("pipeline",), output=tmp_path, dtype="fp32")
    kind = StableDiffusionPipeline if family == "sd" else StableDiffusionXLPipeline
    merged = kind.from_pretrained(folder)
    assert len(merged.tokenizer("zwx", add_special_tokens=False).input_ids) == 1
    assert np.abs(draw_stock(merged, case.prompt) - ours).max() < CLOSE


def test_a_new_word_has_no_row_in_a_checkpoint_so_its_file_comes_along(
    make_case: Callable[..., Case], tmp_path: Path
) -> None:
    case, said = make_case("sd", "token", "zwx"), list[str]()
    checkpoint, token = export_files(case.run.folder, said.append, layouts=("checkpoint",), output=tmp_path)
    assert token.name == "zwx.safetensors"
    assert any("needs zwx.safetensors beside it" in line for line in said)
    rows = load_file(checkpoint)["cond_stage_model.model.token_embedding.weight"].shape[0]
    assert rows == case.state.pair.encoder.tokenizers[0].vocab_size


def test_the_teacher_can_be_merged_too(make_case: Callable[..., Case], tmp_path: Path) -> None:
    case = make_case("sd")
    folder, checkpoint = export_files(
        case.run.folder, layouts=("pipeline", "checkpoint"), roles=("teacher",), output=tmp_path, dtype="fp32"
    )
    assert folder.name == "sks-dog-teacher-merged"
    assert "Subject: sks dog." in (folder / "README.md").read_text()
    (bare,) = export_files(
        case.run.folder, layouts=("pipeline",), roles=("teacher",), output=tmp_path / "bare", metadata=False
    )
    assert not (bare / "README.md").exists()
    ours = case.picture("teacher")
    merged = StableDiffusionPipeline.from_pretrained(folder)
    assert merged.scheduler.config.prediction_type == "v_prediction"
    close = 5 * CLOSE  # rounding adds up over 25 guided steps
    assert np.abs(draw_stock(merged, case.prompt) - ours).max() < close
    single = load(checkpoint, single_file_config=str(case.pair[1]))
    assert np.abs(draw(single, case.prompt) - ours).max() < close


def test_a_student_that_starts_early_starts_there_in_diffusers_and_from_its_lora_file_alone(
    make_case: Callable[..., Case], tmp_path: Path
) -> None:
    case = make_case("sd")
    config = case.run.config
    output = str(tmp_path / "early")
    model = dataclasses.replace(config.model, student_timesteps=(399,))
    config = dataclasses.replace(config, model=model, run=dataclasses.replace(config.run, output=output))
    run = create_run(config, overwrite=False)
    run.save_checkpoint(3, case.state.state_dict())
    lora, folder = export_files(run.folder, layouts=("kohya", "pipeline"), output=tmp_path / "out", dtype="fp32")
    pair = load(folder, student_timesteps=(399,))
    ours = draw(pair, case.prompt)
    assert np.abs(ours - case.picture()).mean() > 0.01
    merged = StableDiffusionPipeline.from_pretrained(folder)
    assert np.abs(draw_stock(merged, case.prompt) - ours).max() < CLOSE
    merged.scheduler.set_timesteps(3)
    assert merged.scheduler.timesteps.tolist() == trailing_timesteps(pair.student.schedule, 3, 399)
    assert find(lora).models(str(case.pair[0])).student_timesteps == (399,)
    assert find(lora).models(str(case.pair[0]), {"student_timesteps": ()}).student_timesteps == ()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_halves_a_merged_model_and_changes_little(
    make_case: Callable[..., Case], dtype: str, tmp_path: Path
) -> None:
    case = make_case("sdxl")
    folder, checkpoint = export_files(case.run.folder, layouts=("pipeline", "checkpoint"), output=tmp_path, dtype=dtype)
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    stored = [*load_file(checkpoint).values(), *load_file(folder / "unet/diffusion_pytorch_model.safetensors").values()]
    assert {value.dtype for value in stored if value.is_floating_point()} == {wanted}
    ours = case.picture()
    assert np.abs(draw(load(folder), case.prompt) - ours).mean() < 0.02


# the merged files themselves


def test_the_names_and_values_in_a_checkpoint_are_those_of_a_second_mapping(
    make_case: Callable[..., Case], tmp_path: Path
) -> None:
    for family, mapped in (("sd", sd2_state), ("sdxl", sdxl_state)):
        case = make_case(family)
        folder, checkpoint = export_files(
            case.run.folder, layouts=("pipeline", "checkpoint"), output=tmp_path / family, dtype="fp32"
        )
        expected, found = mapped(folder), load_file(checkpoint)
        # That mapping also gives SDXL's second encoder the unused last layer that only SD2's files have.
        unused = {name for name in expected if name.startswith("conditioner.embedders.1.model.transformer.resblocks.2")}
        assert found.keys() == expected.keys() - unused
        for name in found:
            torch.testing.assert_close(found[name], expected[name].to(found[name]), rtol=0, atol=0.01)


def paths_in(folder: Path, *places: Path) -> list[str]:
    """The files below a folder in which one of these paths stands."""
    marks = [str(place).encode() for place in (Path.home(), Path(diffusers.__file__).parents[1], *places)]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(path.name for path in files if any(mark in path.read_bytes() for mark in marks))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_no_exported_byte_tells_a_path_of_this_machine(
    make_case: Callable[..., Case], family: str, tmp_path: Path
) -> None:
    case = make_case(family)
    export_files(
        case.run.folder, layouts=("kohya", "diffusers", "pipeline", "checkpoint", "onnx"), output=tmp_path / "new"
    )
    assert paths_in(tmp_path / "new", case.run.folder.parent, case.pair[0].parent, Path.cwd()) == []
    for folder in (tmp_path / "new").iterdir():
        for tokenizer in folder.glob("tokenizer*"):
            assert json.loads((tokenizer / "vocab.json").read_text())
            assert (tokenizer / "merges.txt").read_text().startswith("#version")


def test_a_merged_text_encoder_has_the_names_that_every_transformers_reads(
    make_case: Callable[..., Case], tmp_path: Path
) -> None:
    (folder,) = export_files(make_case("sd").run.folder, layouts=("pipeline",), output=tmp_path)
    names = load_file(folder / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)


def test_a_checkpoint_says_what_it_is_and_has_equal_bytes_each_time(
    make_case: Callable[..., Case], tmp_path: Path
) -> None:
    case = make_case("sd")
    first, second = (
        export_files(case.run.folder, layouts=("checkpoint",), output=tmp_path / name)[0]
        for name in ("first", "second")
    )
    assert first.read_bytes() == second.read_bytes()
    found = inspect_file(first)
    assert (found.kind, found.triggers) == ("checkpoint", ("sks dog",))
    metadata = read_lora(first).metadata
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-512"
    assert "1 step" in metadata["modelspec.usage_hint"]
    (bare,) = export_files(case.run.folder, layouts=("checkpoint",), output=tmp_path / "bare", metadata=False)
    assert read_lora(bare).metadata == {"format": "pt"}


def test_a_single_file_is_exported_with_the_vocabulary_of_the_runs_model(
    make_case: Callable[..., Case], tmp_path: Path
) -> None:
    case = make_case("sd")
    (first,) = export_files(case.run.folder, layouts=("checkpoint",), output=tmp_path / "one", dtype="fp32")
    assert find(case.run.folder).models(str(first)).tokenizer == str(case.pair[0])
    shape = {"single_file_config": str(case.pair[0]), "offline": True}
    options: dict[str, Any] = {"layouts": ("checkpoint",), "model": str(first), "model_overrides": shape}
    (second,) = export_files(case.run.folder, output=tmp_path / "two", dtype="fp32", **options)
    assert load_file(second).keys() == load_file(first).keys()


def test_a_model_without_a_place_in_the_original_layout_is_refused_and_leaves_nothing(
    small_pair: Pair, small_backbones: dict[str, Path], tmp_path: Path
) -> None:
    plain = {"critic__discriminators": (), "critic__identity": "none", "loss__adversarial": 0.0, "loss__identity": 0.0}
    config = small_config(small_pair, small_backbones, **plain, run__output=str(tmp_path / "run"))
    run = create_run(config, overwrite=False)
    run.save_checkpoint(1, build_state(config, small_photos()).state_dict())
    with pytest.raises(ConfigError, match=r"1 layers per block .* --format pipeline"):
        export_files(run.folder, layouts=("checkpoint",))
    assert not (run.folder / "export").exists()


def test_what_is_there_is_replaced_only_when_asked_and_only_as_a_whole(
    make_case: Callable[..., Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("sd")
    layouts = ("kohya", "pipeline", "checkpoint")
    files = export_files(case.run.folder, layouts=layouts, output=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert export_files(case.run.folder, layouts=layouts, output=tmp_path) == files
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for layout in layouts:
        with pytest.raises(ConfigError, match="exists already"):
            export_files(case.run.folder, layouts=(layout,), output=tmp_path, dtype="bf16")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    again = export_files(case.run.folder, layouts=layouts, output=tmp_path, overwrite=True)
    assert again == files

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("echodistill_cli.outputs.apply.save_file", full)
    monkeypatch.setattr("echodistill_cli.lora.safetensors_io.save_file", full)
    monkeypatch.setattr("diffusers.models.modeling_utils.ModelMixin.save_pretrained", full)
    for layout in ("pipeline", "checkpoint"):
        with pytest.raises(EchoDistillError, match="The disk is full"):
            export_files(case.run.folder, layouts=(layout,), output=tmp_path, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_lora_of_another_model_is_refused_by_module(
    make_case: Callable[..., Case], small_pair: Pair, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="does not fit this model: unet"):
        export_files(make_case("sd").run.folder, layouts=("pipeline",), model=str(small_pair[0]), output=tmp_path)
    with pytest.raises(ConfigError, match="is for sdxl, and the model is sd"):
        export_files(make_case("sdxl").run.folder, layouts=("pipeline",), model=str(small_pair[0]), output=tmp_path)
    assert not any(tmp_path.iterdir())


# from one LoRA file to another


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_file_goes_from_kohya_to_diffusers_and_back_unchanged(
    make_case: Callable[..., Case], family: str, tmp_path: Path
) -> None:
    case = make_case(family)
    (kohya,) = export_files(case.run.folder, output=tmp_path)
    (diffusers,) = export_files(kohya, layouts=("diffusers",))
    (back,) = export_files(diffusers, layouts=("kohya",), output=tmp_path / "back")
    assert (diffusers.name, back.name) == ("sks-dog-diffusers.safetensors", "sks-dog-diffusers-kohya.safetensors")
    first, last = load_file(kohya), load_file(back)
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert inspect_file(diffusers).format == "diffusers"
    said, kept = read_lora(kohya).metadata, read_lora(back).metadata
    assert kept == {**said, "ss_output_name": back.stem}
    assert np.abs(draw_with_lora(case, kohya, []) - draw_with_lora(case, diffusers, [])).max() < 1e-3


def test_a_foreign_file_gets_folded_alpha_another_precision_and_what_readers_need(tmp_path: Path) -> None:
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    down, up = torch.randn(4, 1024), torch.randn(320, 4)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    source = tmp_path / "theirs.safetensors"
    metadata = {"ss_tag_frequency": '{"a": {"xyz cat": 3}}', "sshs_model_hash": "of another body"}
    save_file({f"{module}.{part}": value for part, value in tensors.items()}, source, metadata)
    diffusers, kohya = export_files(source, layouts=("diffusers", "kohya"), dtype="bf16")
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora"
    assert torch.equal(load_file(diffusers)[f"{path}.up.weight"], (up * 0.5).bfloat16())
    assert torch.equal(load_file(diffusers)[f"{path}.down.weight"], down.bfloat16())
    found = read_lora(kohya)
    assert found.metadata["ss_tag_frequency"] == metadata["ss_tag_frequency"]
    assert found.metadata["sshs_model_hash"] != metadata["sshs_model_hash"]
    assert (found.metadata["ss_v2"], found.metadata["ss_network_alpha"]) == ("True", "4.0")
    assert all(reader.loads == "fully" for reader in inspect_file(kohya).readers)


def test_a_file_of_several_ranks_is_written_again_in_both_layouts(tmp_path: Path) -> None:
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to"
    tensors: dict[str, torch.Tensor] = {}
    for name, rank in (("k", 2), ("v", 3)):
        tensors |= {f"{stem}_{name}.lora_down.weight": torch.randn(rank, 1024)}
        tensors |= {f"{stem}_{name}.lora_up.weight": torch.randn(1280, rank)}
    save_file(tensors, tmp_path / "a.safetensors")
    for file in export_files(tmp_path / "a.safetensors", layouts=("kohya", "diffusers"), output=tmp_path / "b"):
        assert sorted(module.rank for module in read_lora(file).modules) == [2, 3]


def test_a_damaged_file_another_kind_and_a_step_of_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x02}q\x00" + bytes(100))
    with pytest.raises(ModelError, match=r"pickle\.safetensors is a Python pickle"):
        export_files(tmp_path / "pickle.safetensors")
    save_file({"model.diffusion_model.out.0.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError):
        export_files(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="has no --step"):
        export_files(tmp_path / "model.safetensors", step=3)
    with pytest.raises(ConfigError, match="no such run folder or LoRA file"):
        export_files(tmp_path / "nowhere.safetensors")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_lora_file_is_merged_into_the_model_that_is_named(make_case: Callable[..., Case], tmp_path: Path) -> None:
    case = make_case("sd")
    (lora,) = export_files(case.run.folder, output=tmp_path, dtype="fp32")
    with pytest.raises(ConfigError, match="Name the model"):
        export_files(lora, layouts=("pipeline",))
    overrides = {"device": "cpu", "offline": True, "resolution": 64}
    (folder,) = export_files(
        lora, layouts=("pipeline",), dtype="fp32", model=str(case.pair[0]), model_overrides=overrides
    )
    merged = StableDiffusionPipeline.from_pretrained(folder)
    assert np.abs(draw_stock(merged, case.prompt) - case.picture()).max() < CLOSE


# sidecars and the bundled word


def test_a_kohya_file_has_a_card_and_the_runs_preview_beside_it(make_case: Callable[..., Case], tmp_path: Path) -> None:
    case = make_case("sd")
    run = Run(Path(shutil.copytree(case.run.folder, tmp_path / "run")), case.run.config)
    picture = png_bytes(Image.new("RGB", (64, 64), "red"))
    write_loras(run, case.state.state_dict(), TrainingRecord(1.7e9, 1.7e9 + 9, picture))
    assert (run.folder / "sks-dog.png").read_bytes() == picture
    (lora,) = export_files(run.folder)
    assert lora.with_suffix(".png").read_bytes() == picture
    assert read_lora(lora).metadata["ss_training_finished_at"] == str(1.7e9 + 9)
    card = json.loads(lora.with_suffix(".json").read_text())
    assert (card["activation text"], card["preferred weight"], card["sd version"]) == ("sks dog", 1.0, "SD2")
    assert "1 step" in card["notes"]
    workflow = json.loads(lora.with_name("sks-dog-comfyui.json").read_text())
    assert "sks-dog.safetensors" in [node["inputs"].get("lora_name") for node in workflow.values()]


def test_sidecars_are_left_out_with_the_metadata_and_in_other_layouts(
    make_case: Callable[..., Case], tmp_path: Path
) -> None:
    case = make_case("sdxl")
    export_files(case.run.folder, layouts=("diffusers",), output=tmp_path)
    export_files(case.run.folder, output=tmp_path, metadata=False)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}
    (tmp_path / "sks-dog.safetensors").unlink()
    (tmp_path / "sks-dog.json").write_text("a person's own notes")
    with pytest.raises(ConfigError, match=r"sks-dog\.json exists already"):
        export_files(case.run.folder, output=tmp_path)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_bundled_word_lies_under_a1111s_keys_in_a_file_of_its_own_name(
    make_case: Callable[..., Case], family: str, tmp_path: Path
) -> None:
    case, said = make_case(family, "token"), list[str]()
    bundled, token = export_files(case.run.folder, said.append, output=tmp_path, bundle_embedding=True)
    assert bundled.name == "sks-dog-a1111.safetensors"
    ours = [vector.detach()[None] for vector in case.state.token.vectors] if case.state.token else []
    keys = ["string_to_param.*"] if family == "sd" else ["clip_l", "clip_g"]
    stored = load_file(bundled)
    for key, vector in zip(keys, ours, strict=True):
        assert torch.equal(stored[f"bundle_emb.sks.{key}"], vector)
    assert any("diffusers refuses" in line and "ComfyUI" in line and "Forge" in line for line in said)
    assert token.name == "sks.safetensors"


def test_there_must_be_a_word_to_bundle(make_case: Callable[..., Case], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a learned token"):
        export_files(make_case("sd").run.folder, output=tmp_path, bundle_embedding=True)
    with pytest.raises(ConfigError, match="--format kohya"):
        export_files(
            make_case("sd", "token").run.folder, layouts=("diffusers",), output=tmp_path, bundle_embedding=True
        )


def test_what_is_said_of_a_bundled_word_is_what_inspect_finds(tmp_path: Path) -> None:
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    halves = {f"{module}.lora_A.weight": torch.randn(2, 1024), f"{module}.lora_B.weight": torch.randn(320, 2)}
    tensors = kohya_tensors([LoraWeights("unet", halves, 2, 2.0)], "sd", torch.float16)
    tensors |= bundled_tensors("sks", {"text_encoder": torch.randn(1, 1024)}, "sd")
    header = {"ss_v2": "True", "ss_base_model_version": "sd_v2"}
    write_safetensors(tmp_path / "a.safetensors", tensors, header)
    loads = {reader.reader: reader.loads for reader in inspect_file(tmp_path / "a.safetensors").readers}
    assert loads == {
        "diffusers": "no",
        "ComfyUI": "partly",
        "A1111": "fully",
        "Forge": "partly",
        "sd-scripts": "partly",
        "InvokeAI": "no",
        "SD.Next": "fully",
        "stable-diffusion.cpp": "partly",
    }


def test_a_bundled_token_that_is_a_path_names_no_file_elsewhere(tmp_path: Path) -> None:
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    halves = {f"{module}.lora_A.weight": torch.randn(2, 1024), f"{module}.lora_B.weight": torch.randn(320, 2)}
    tensors = kohya_tensors([LoraWeights("unet", halves, 2, 2.0)], "sd", torch.float16)
    tensors[f"bundle_emb.{tmp_path / 'escaped'}.string_to_param.*"] = torch.randn(1, 1024)
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="cannot be used as a file name"):
        export_files(tmp_path / "a.safetensors", output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


# the lines in a run's card


def draw_as_the_card_says(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The picture of the card's own lines, run in a folder that the run's files lie in, on a CPU in full precision."""
    export_files(case.run.folder, output=folder, dtype="fp32")
    (folder / case.pair[0].name).symlink_to(case.pair[0])
    card = model_card(case.run.config, case.state.state_dict(), Path("sks-dog.safetensors"), "preview.png")
    code = card.split("```python\n")[1].split("```")[0]
    # torch_dtype is what every release of diffusers takes; new ones warn that it will be `dtype`.
    changes = {"torch_dtype=torch.float16": "dtype=torch.float32", '.to("cuda")': "", ").images": ", **more).images"}
    for line, here in changes.items():
        assert line in code
        code = code.replace(line, here)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"more": {"latents": seeded_noise([SEED], (4, 8, 8)), "output_type": "np"}}
    exec(compile(code, "card", "exec"), names)
    return np.asarray(names["image"])


@every_kind
def test_the_lines_in_the_card_draw_the_picture_of_the_run(
    make_case: Callable[..., Case],
    family: str,
    text: str,
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make_case(family, text, word)
    assert np.abs(draw_as_the_card_says(case, tmp_path, monkeypatch) - case.picture()).max() < CLOSE


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # peft speaks of every second LoRA
def test_the_lines_in_the_card_of_a_distilled_base_draw_its_picture_too(
    small_sdxl_pair: Pair, small_backbones: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora = small_sdxl_pair[1], write_distillation(small_sdxl_pair[1], tmp_path / "one-step.safetensors")
    plain = {"critic__discriminators": (), "critic__identity": "none", "loss__adversarial": 0.0, "loss__identity": 0.0}
    run = {"model__student_lora": str(lora), "run__output": str(tmp_path / "run"), "run__name": "sks-dog"}
    config = small_config((base, base), small_backbones, **plain, **run)
    state = build_state(config, small_photos())
    _strengthen(state)
    case = Case(create_run(config, overwrite=False), state, (base, base), "sks")
    case.run.save_checkpoint(3, state.state_dict())
    assert np.abs(draw_as_the_card_says(case, tmp_path, monkeypatch) - case.picture()).max() < CLOSE
