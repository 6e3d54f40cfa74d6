"""`python -m examples.mini_world.restore FOLDER`: go on from an exported pair where the checkpoints are gone.

An export holds averaged weights in half precision and no optimizer state. From it this makes the work directory's
tokenizer, final VAE and teacher checkpoint, so that every stage finds them; the optimizer starts anew, and the latents
are encoded again by `train_all.sh`. The student goes on with `--start FOLDER/student`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from examples.mini_world.sprites import default_work_directory


def restore(folder: Path, work: Path) -> int:
    """Fill `work` from an exported pair; returns the samples that its teacher has seen.

    Args:
        folder: with the folders `teacher` and `student`, which share what the student's has.
        work: work directory of the mini world.

    Raises:
        FileExistsError: `work` has a teacher already.
    """
    checkpoint = work / "teacher" / "checkpoint.pt"
    if checkpoint.exists():
        raise FileExistsError(f"{checkpoint} exists; restore into another --work")
    teacher, student = folder / "teacher", folder / "student"
    samples = int(json.loads((teacher / "card.json").read_text())["samples"])
    shutil.copytree(student / "tokenizer", work / "tokenizer")
    vae = AutoencoderTiny.from_pretrained(student / "vae").float()
    _write(work / "vae" / "checkpoint.pt", vae, samples=0)
    (work / "vae" / "scaling_factor.txt").write_text(f"{vae.config['scaling_factor']:.4f}\n")
    (work / "vae" / "finished").touch()
    parts = {
        "unet": UNet2DConditionModel.from_pretrained(teacher / "unet").float(),
        "text_encoder": CLIPTextModel.from_pretrained(student / "text_encoder").float(),
    }
    _write(checkpoint, nn.ModuleDict(parts), samples=samples)
    return samples


def _write(path: Path, network: nn.Module, samples: int) -> None:
    """A checkpoint as the runner reads it, without optimizer and random state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = network.state_dict()
    average = {name: parameter.detach() for name, parameter in network.named_parameters()}
    torch.save({"network": weights, "average": average, "samples": samples, "updates": 0}, path)


def main(arguments: list[str] | None = None) -> None:
    """Restore and say how far the teacher is."""
    parser = argparse.ArgumentParser(prog="python -m examples.mini_world.restore", description=__doc__)
    parser.add_argument("folder", type=Path, help="teacher and student, as written by export_pair")
    parser.add_argument("--work", type=Path, default=default_work_directory())
    options = parser.parse_args(arguments)
    print(f"the teacher goes on from {restore(options.folder, options.work):,} samples")


if __name__ == "__main__":
    main()
