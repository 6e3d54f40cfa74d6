"""Scores of a model's images for every prompt and seed, as the judge reads them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from numpy.typing import NDArray
from torch import Tensor

from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.diffusion.sampling import SamplingSettings, generate
from echodistill_cli.models.sources import embedded_folder
from examples.benchmark.subjects import (
    PROMPTS,
    SEEDS,
    SPLITS,
    TOKEN,
    class_name,
    real_pictures,
    reference_pictures,
    vendor_of,
)
from examples.mini_world.judges import Examiner
from examples.mini_world.models import as_tensor, decode, encode

ImageBatch = NDArray[np.uint8]
STUDENT = SamplingSettings(role="student", steps=1, size=64, batch_size=32)
TEACHER = SamplingSettings(role="teacher", steps=25, guidance_scale=3.5, size=64, batch_size=64)
JUDGE = Path(__file__).parent / "judges" / "judge-1"
# An image counts as recognized only if it has at least this share of the sharpness that the VAE leaves of a render.
LEAST_SHARPNESS = 0.5


class Ruler:
    """Scores images of one subject, relative to its references and to real renders of it.

    Args:
        noun: the subject.
        examiner: the judge.
        split: the subject's split, which names its vendor.
    """

    def __init__(self, noun: str, examiner: Examiner, split: str = "test") -> None:
        vendor = vendor_of(split)
        self.sprite, self.examiner = f"{noun}/{vendor}", examiner
        self.references = np.stack(reference_pictures(noun, vendor))
        self.real = real_pictures(noun, vendor=vendor)
        self.reference_features = examiner.read(self.references).features
        subjects = SPLITS["vendor2"] if split == "vendor2" else (*SPLITS["dev"], *SPLITS["test"])
        everyone = np.concatenate([np.stack(reference_pictures(other, vendor)) for other in subjects])
        self.center = examiner.read(everyone).features.mean(dim=0)
        self.real_spread = spread(examiner.read(self.real).features)
        # Half the smallest distance of any real render to a reference. An image that is closer is a copy.
        self.copy_distance = nearest_distance(self.real, self.references).min() / 2
        # No model of the pair can be sharper than what its VAE leaves of the same renders, (prompts × seeds).
        self.ceiling = details(through_vae(self.real))

    def is_sharp(self, images: ImageBatch) -> NDArray[np.bool_]:
        """Return which images (prompts × any seeds, 64, 64, 3) have half the sharpness of their prompt's ceiling."""
        ceiling = self.ceiling.reshape(len(PROMPTS), len(SEEDS)).mean(axis=1).repeat(len(images) // len(PROMPTS))
        sharp: NDArray[np.bool_] = details(images) >= LEAST_SHARPNESS * ceiling
        return sharp

    def scores(self, images: ImageBatch) -> dict[str, float]:
        """Return the scores of images (prompts × seeds, 64, 64, 3), in order of prompts."""
        reading = self.examiner.read(images)
        asks = [ask for ask in PROMPTS for _ in SEEDS]
        colours = reading.answers["colour"]
        obeyed = [
            place == ask.place and (ask.colour is None or colour == ask.colour)
            for place, colour, ask in zip(reading.answers["place"], colours, asks, strict=True)
        ]
        copies = nearest_distance(images, self.references) < self.copy_distance
        named = np.array([answer == self.sprite for answer in reading.answers["sprite"]])
        recognized, recolored = named & self.is_sharp(images), np.array([ask.colour is not None for ask in asks])
        return {
            "recognition": float(recognized.mean()),
            # A prompt such as "a red dog" contradicts the photos: what fails there is another ability.
            "recognition_plain": float(recognized[~recolored].mean()),
            "recognition_recolored": float(recognized[recolored].mean()),
            "named": float(named.mean()),
            "subject_fidelity": fidelity(reading.features, self.reference_features, self.center),
            "prompt_fidelity": float(np.mean(obeyed)),
            "copy_rate": float(copies.mean()),
            "diversity": spread(reading.features) / self.real_spread,
            "sharpness": detail(images) / detail(self.real),
            "sharpness_share": detail(images) / float(self.ceiling.mean()),
        }

    def drift(self, before: ImageBatch, after: ImageBatch) -> float:
        """Return how far images of the class moved, relative to the effect of another seed."""
        first, second = (self.examiner.read(images).features for images in (before, after))
        return float((first - second).norm(dim=-1).mean()) / spread(first)


@cache
def embedded_vae() -> AutoencoderTiny:
    """Return the embedded pair's VAE, which teacher and student share."""
    vae: AutoencoderTiny = AutoencoderTiny.from_pretrained(embedded_folder("mini:student") / "vae").float()
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def through_vae(images: ImageBatch) -> ImageBatch:
    """Return images (N, 64, 64, 3) encoded and decoded by the embedded VAE: the sharpest that the pair can generate."""
    vae = embedded_vae()
    again = torch.cat([decode(vae, encode(vae, part)).clamp(-1, 1) for part in torch.split(as_tensor(images), 32)])
    coded: ImageBatch = again.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return coded


def fidelity(features: Tensor, references: Tensor, center: Tensor) -> float:
    """Return the mean cosine of features [N, D] to references [R, D], both centered on the mean of all subjects."""
    unit, unit_references = (F.normalize(x - center, dim=-1) for x in (features, references))
    return float((unit @ unit_references.T).mean())


def details(images: ImageBatch) -> NDArray[np.float32]:
    """Return each image's mean absolute Laplacian in gray, without an eighth at each border; images (N, 64, 64, 3)."""
    gray = images.astype(np.float32).mean(axis=-1)
    neighbors = gray[:, :-2, 1:-1] + gray[:, 2:, 1:-1] + gray[:, 1:-1, :-2] + gray[:, 1:-1, 2:]
    found: NDArray[np.float32] = np.abs(4 * gray[:, 1:-1, 1:-1] - neighbors)[:, 7:-7, 7:-7].mean(axis=(1, 2))
    return found


def detail(images: ImageBatch) -> float:
    """Return the mean absolute Laplacian of images (N, 64, 64, 3), their sharpness."""
    return float(details(images).mean())


def spread(features: Tensor) -> float:
    """Return the mean distance between the seeds of each prompt; features (prompts × seeds, width)."""
    groups = features.view(-1, len(SEEDS), features.shape[-1])
    return float(torch.stack([torch.pdist(group).mean() for group in groups]).mean())


def nearest_distance(images: ImageBatch, references: ImageBatch) -> NDArray[np.float32]:
    """Return each image's RMS difference (0..255) to the nearest reference, mirrored or not."""
    both = np.concatenate([references, references[:, :, ::-1]]).astype(np.float32)
    apart = images[:, None].astype(np.float32) - both[None]
    distances: NDArray[np.float32] = np.sqrt((apart**2).mean(axis=(2, 3, 4))).min(axis=1)
    return distances


def draw(pair: ModelPair, noun: str, settings: SamplingSettings, *, with_token: bool) -> ImageBatch:
    """Generate an image for every prompt and seed, (prompts × seeds, 64, 64, 3).

    Args:
        pair: the models.
        noun: the subject.
        settings: the role and how it samples.
        with_token: True prompts the subject, False its class.
    """
    subject = f"{TOKEN} {class_name(noun)}" if with_token else class_name(noun)
    prompts = [ask.prompt(subject) for ask in PROMPTS for _ in SEEDS]
    return np.stack([image.numpy() for image in generate(pair, prompts, [*SEEDS] * len(PROMPTS), settings)])
