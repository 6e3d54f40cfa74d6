"""What the benchmark measures of a model: the judge's scores of its pictures, under every prompt and seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.diffusion.sampling import SamplingSettings, generate
from examples.benchmark.subjects import (
    DEV,
    PROMPTS,
    SEEDS,
    TEST,
    TOKEN,
    class_name,
    real_pictures,
    reference_pictures,
)
from examples.mini_world.judges import Examiner
from examples.mini_world.nouns import HELD_OUT_VENDOR

ImageBatch = NDArray[np.uint8]
STUDENT = SamplingSettings(role="student", steps=1, size=64, batch_size=32)
TEACHER = SamplingSettings(role="teacher", steps=25, guidance_scale=3.5, size=64, batch_size=64)
JUDGE = Path(__file__).parent / "judges" / "judge-0"


class Ruler:
    """A judge, and what it says of one subject's references and of real pictures of it."""

    def __init__(self, noun: str, examiner: Examiner) -> None:
        self.noun, self.examiner = noun, examiner
        self.references = np.stack(reference_pictures(noun))
        self.real = real_pictures(noun)
        self.reference_features = examiner.read(self.references).features
        everyone = np.concatenate([np.stack(reference_pictures(other)) for other in (*DEV, *TEST)])
        self.centre = examiner.read(everyone).features.mean(dim=0)
        self.real_spread = spread(examiner.read(self.real).features)
        # No real picture comes closer to a reference than this; what comes twice as close is a copy.
        self.copy_distance = nearest_distance(self.real, self.references).min() / 2

    def scores(self, pictures: ImageBatch) -> dict[str, float]:
        """Scores of pictures (prompts × seeds, 64, 64, 3), prompt by prompt."""
        reading = self.examiner.read(pictures)
        asks = [ask for ask in PROMPTS for _ in SEEDS]
        colours = reading.answers["colour"]
        obeyed = [
            place == ask.place and (ask.colour is None or colour == ask.colour)
            for place, colour, ask in zip(reading.answers["place"], colours, asks, strict=True)
        ]
        copies = nearest_distance(pictures, self.references) < self.copy_distance
        return {
            "recognition": reading.right("sprite", [f"{self.noun}/{HELD_OUT_VENDOR}"] * len(asks)),
            "subject_fidelity": fidelity(reading.features, self.reference_features, self.centre),
            "prompt_fidelity": float(np.mean(obeyed)),
            "copy_rate": float(copies.mean()),
            "diversity": spread(reading.features) / self.real_spread,
            "sharpness": detail(pictures) / detail(self.real),
        }

    def drift(self, before: ImageBatch, after: ImageBatch) -> float:
        """How far pictures of the class moved, as a share of what another seed would have moved them."""
        first, second = (self.examiner.read(pictures).features for pictures in (before, after))
        return float((first - second).norm(dim=-1).mean()) / spread(first)


def fidelity(features: Tensor, references: Tensor, centre: Tensor) -> float:
    """Mean cosine of pictures [N, D] to all references [R, D], seen from the mean of all subjects (DINO-I's role)."""
    unit, unit_references = (F.normalize(x - centre, dim=-1) for x in (features, references))
    return float((unit @ unit_references.T).mean())


def detail(pictures: ImageBatch) -> float:
    """Mean absolute Laplacian of the grey pictures [N, 64, 64, 3], but for an eighth of the side at each border."""
    grey = pictures.astype(np.float32).mean(axis=-1)
    neighbours = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return float(np.abs(4 * grey[:, 1:-1, 1:-1] - neighbours)[:, 7:-7, 7:-7].mean())


def spread(features: Tensor) -> float:
    """Mean distance between the seeds of each prompt; features (prompts × seeds, width), prompt by prompt."""
    groups = features.view(-1, len(SEEDS), features.shape[-1])
    return float(torch.stack([torch.pdist(group).mean() for group in groups]).mean())


def nearest_distance(pictures: ImageBatch, references: ImageBatch) -> NDArray[np.float32]:
    """Per picture, the root mean squared difference to the nearest reference, mirrored or not; 0..255."""
    both = np.concatenate([references, references[:, :, ::-1]]).astype(np.float32)
    apart = pictures[:, None].astype(np.float32) - both[None]
    distances: NDArray[np.float32] = np.sqrt((apart**2).mean(axis=(2, 3, 4))).min(axis=1)
    return distances


def draw(pair: ModelPair, noun: str, settings: SamplingSettings, *, with_token: bool) -> ImageBatch:
    """Pictures under every prompt and seed, (prompts × seeds, 64, 64, 3), of the subject or of its class."""
    subject = f"{TOKEN} {class_name(noun)}" if with_token else class_name(noun)
    prompts = [ask.prompt(subject) for ask in PROMPTS for _ in SEEDS]
    return np.stack([picture.numpy() for picture in generate(pair, prompts, [*SEEDS] * len(PROMPTS), settings)])
