"""DreamBooth's scores as pure functions: embeddings in, one number out.

Ruiz et al. 2022, "DreamBooth" (arXiv 2208.12242), section 4.2: CLIP-I and DINO are the average pairwise cosine between
embeddings of drawn and of real pictures, CLIP-T that between a prompt's embedding and its pictures'. 1 is the same
direction, 0 nothing in common. Embeddings may have any length but 0; sums are in double precision.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pairwise_cosine(first: Tensor, second: Tensor) -> Tensor:
    """The cosine of every row of [N, D] with every row of [M, D]: [N, M]."""
    return F.normalize(first.double(), dim=-1) @ F.normalize(second.double(), dim=-1).T


def subject_fidelity(drawn: Tensor, photos: Tensor) -> float:
    """CLIP-I or DINO, by whose embeddings they are: the mean cosine of all N x M pairs.

    Args:
        drawn: [N, D], of the drawn pictures. photos: [M, D], of the real ones.
    """
    return float(pairwise_cosine(drawn, photos).mean())


def prompt_fidelity(drawn: Tensor, prompts: Tensor) -> float:
    """CLIP-T: the mean cosine of each picture with its own prompt.

    Args:
        drawn: [N, D], CLIP's image embeddings. prompts: [N, D], its text embeddings; row i is what picture i shows.
    """
    return float(F.cosine_similarity(drawn.double(), prompts.double(), dim=-1).mean())


def own_similarity(photos: Tensor) -> float | None:
    """How alike the real pictures are: the mean cosine of the M (M - 1) / 2 pairs of different ones; None for M = 1.

    DreamBooth's table has it as "real images". Drawn pictures that keep the subject and change its surroundings cannot
    be expected above it.

    Args:
        photos: [M, D], of the real pictures.
    """
    count = len(photos)
    if count < 2:
        return None
    cosines = pairwise_cosine(photos, photos)
    return float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))
