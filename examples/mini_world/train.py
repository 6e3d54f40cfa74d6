"""`python -m examples.mini_world.train STAGE`: one command line for every stage, resumable, CPU or CUDA.

A stage run again goes on where it stopped (weights, averages, optimizer, random state). The learning rate
stays constant; a last session with `--anneal` takes it to zero.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from examples.mini_world.runner import Budget, Stage, run_stage
from examples.mini_world.sprites import default_work_directory
from examples.mini_world.world import open_world

STAGES = (
    "vae",
    "latents",
    "teacher",
    "identity",
    "backbone-clip",
    "backbone-vit",
    "judge",
    "pairs",
    "student",
    "matched",
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; `None` reads `sys.argv`."""
    parser = argparse.ArgumentParser(prog="python -m examples.mini_world.train", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, default=default_work_directory(), help="where everything made is kept")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads at most; fewer while others compute")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes of this session")
    parser.add_argument("--samples", type=int, help="stop after so many samples of this session")
    parser.add_argument("--anneal", action="store_true", help="decay the learning rate to zero over this session")
    parser.add_argument("--nouns", type=int, default=12, help="latents, teacher, judge: the first N nouns, 0 for all")
    parser.add_argument("--batch-size", type=int, help="samples of one update")
    parser.add_argument("--rate", type=float, help="peak learning rate")
    parser.add_argument("--compile", action="store_true", help="vae, teacher: torch.compile the step")
    parser.add_argument("--shards", type=int, default=12, help="latents: shards of 8192 pictures to add")
    parser.add_argument("--centred", action="store_true", help="latents: large centred subjects (curriculum)")
    parser.add_argument(
        "--regression-samples", type=int, default=93_000, help="student: samples before the critic joins"
    )
    parser.add_argument("--start", type=Path, help="student, matched, judge: exported folder to start from")
    parser.add_argument("--judge-seed", type=int, default=1, help="judge: which judge, 1, 2, ...")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.anneal and options.minutes is None and options.samples is None:
        parser.error("--anneal needs --minutes or --samples: it has to know where the end is")
    return options


def build_stage(options: argparse.Namespace) -> Stage:
    """The stage that was requested; options left out keep the stage's own defaults."""
    given = {"batch_size": options.batch_size, "rate": options.rate}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if options.stage == "vae":
        from examples.mini_world.vae import VaeStage

        return VaeStage(open_world(options.work, 0), options.device, compiled=options.compile, **chosen)
    if options.stage == "teacher":
        from examples.mini_world.teacher import TeacherStage

        return TeacherStage(options.work, options.nouns, options.device, compiled=options.compile, **chosen)
    if options.stage == "student":
        from examples.mini_world.student import StudentStage

        chosen |= {"regression_samples": options.regression_samples, "start": options.start}
        return StudentStage(options.work, options.nouns, options.device, **chosen)
    if options.stage == "matched":
        from examples.mini_world.matching import MatchedStage

        return MatchedStage(options.work, options.nouns, options.device, start=options.start, **chosen)
    if options.stage == "judge":
        from examples.mini_world.judges import JudgeStage, judge_world
        from examples.mini_world.latents import load_vae

        world = judge_world(options.work, options.nouns)
        chosen |= {"start": options.start}
        return JudgeStage(world, load_vae(options.work), options.device, options.judge_seed, **chosen)
    from examples.mini_world.encoders import ClipStage, IdentityStage, ViTStage
    from examples.mini_world.tokenizer import open_tokenizer

    world = open_world(options.work, 0)
    if options.stage == "backbone-vit":
        return ViTStage(world, options.device, **chosen)
    if options.stage == "backbone-clip":
        return ClipStage(world, open_tokenizer(options.work), options.device, **chosen)
    return IdentityStage(world, options.device, **chosen)


def main(arguments: list[str] | None = None) -> None:
    """Run one stage."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    # Stages of one architecture that started from one seed would begin as one network.
    torch.manual_seed(options.seed + STAGES.index(options.stage))
    if options.stage == "latents":
        from examples.mini_world.latents import add_shards

        world = open_world(options.work, options.nouns)
        add_shards(options.work, world, options.nouns, options.shards, options.centred)
        return
    if options.stage == "pairs":
        from examples.mini_world.student import add_pairs

        add_pairs(options.work, options.nouns, options.device, options.shards)
        return
    stage = build_stage(options)
    budget = Budget(minutes=options.minutes, samples=options.samples, anneal=options.anneal)
    if not run_stage(stage, options.work / stage.name, budget, options.seed + STAGES.index(options.stage)):
        # As a shell reports a SIGTERM, so that a chain of stages stops too.
        raise SystemExit(143)


if __name__ == "__main__":
    main()
