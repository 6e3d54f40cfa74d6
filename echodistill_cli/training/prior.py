"""Prior preservation (Ruiz et al. 2023): what the untouched models make of the subject's class, kept while they learn.

The untouched student draws its own pictures of the class in one step each, so the set costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from echodistill_cli.config.schema import Config
from echodistill_cli.data.views import TEMPLATES, scene_prompt, with_subject
from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.diffusion.sampling import student_x0
from echodistill_cli.diffusion.text import Conditioning

PRIOR_PICTURES = 64


@dataclass(frozen=True)
class Prior:
    """K pictures of the class by the untouched student.

    Args:
        prompts: K texts. noise: [K, C, h, w], what each was drawn from. latents: [K, C, h, w].
        conditioning: of the prompts, as the untouched text side had them.
    """

    prompts: Sequence[str]
    noise: Tensor
    latents: Tensor
    conditioning: Conditioning


def class_prompts(config: Config, count: int) -> list[str]:
    """Prompts for the class without the subject's word: the given ones, or plain wordings and scenes in turn."""
    name = config.concept.class_name
    assert name is not None
    if given := config.concept.class_prompts:
        return [scene_prompt(name, index, given) for index in range(count)]
    plain = [with_subject(TEMPLATES[index % len(TEMPLATES)], name) for index in range(count)]
    scenes = [scene_prompt(name, index, config.concept.scenes) for index in range(count)]
    return [text for both in zip(plain, scenes, strict=True) for text in both][:count]


@torch.no_grad()
def build_prior(config: Config, pair: ModelPair, generator: torch.Generator) -> Prior | None:
    """The class as the models have it before anything is trained; None without a class name or a use for it."""
    replayed = config.train.class_share and config.replays
    if not (config.loss.prior or replayed) or config.concept.class_name is None:
        return None
    prompts = class_prompts(config, PRIOR_PICTURES)
    side = config.model.resolution // pair.codec.factor
    noise = torch.randn(len(prompts), pair.codec.channels, side, side, generator=generator).to(pair.device)
    conditioning = pair.encoder.encode(prompts)
    batch = config.train.batch_size
    rows = [list(range(start, min(start + batch, len(prompts)))) for start in range(0, len(prompts), batch)]
    drawn = [student_x0(pair.student, noise[part], conditioning.take(part)) for part in rows]
    return Prior(prompts, noise, torch.cat(drawn), conditioning)
