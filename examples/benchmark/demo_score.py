"""`python -m examples.benchmark.demo_score RUN`: in how many of 16 one-step images the judge recognizes the demo's dog.

One image for each of the benchmark's prompts, with and without the LoRA. None of the prompts is a training prompt.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import echodistill_cli as ed
from echodistill_cli.cli.options import quiet_libraries
from echodistill_cli.errors import EchoDistillError
from echodistill_cli.runs import open_run
from examples.benchmark.measure import JUDGE, Ruler, detail
from examples.benchmark.subjects import PROMPTS
from examples.mini_world.judges import Examiner


def count(run: Path, scale: float) -> dict[str, int]:
    """Return in how many of 16 images the judge reads the subject and the place, and the sharpness of all.

    Args:
        run: folder of a run.
        scale: of the LoRA; 0 for the base model.
    """
    prompts = [ask.prompt(open_run(run).config.subject) for ask in PROMPTS]
    images = np.stack(
        [np.asarray(one.image) for one in ed.sample(ed.SampleRequest(prompts, lora=run, lora_scale=scale))]
    )
    ruler = Ruler("dog", Examiner(JUDGE))
    reading = ruler.examiner.read(images)
    named = np.array([answer == ruler.sprite for answer in reading.answers["sprite"]])
    place = reading.right("place", [ask.place for ask in PROMPTS])
    return {
        "subject": int((named & ruler.is_sharp(images)).sum()),
        "place": round(place * len(PROMPTS)),
        "sharpness_percent": round(100 * detail(images) / float(ruler.ceiling.mean())),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the counts as JSON."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmark.demo_score", description=__doc__)
    parser.add_argument("run", type=Path, help="such as runs/demo")
    run = parser.parse_args(arguments).run
    try:
        print(json.dumps({"of": len(PROMPTS), "trained": count(run, 1.0), "untouched": count(run, 0.0)}))
    except EchoDistillError as error:
        raise SystemExit(f"error: {error} To train the demo: make demo") from None


if __name__ == "__main__":
    quiet_libraries(offline=True, quiet=True)
    main()
