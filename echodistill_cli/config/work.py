"""How much a run computes in each phase: from a few timed steps this tells how long the rest takes.

No torch. The unit is a forward pass of a UNet over one sample, of either model. A pass that is trained through is
two, because frozen weights need no gradient. At SD's true size a unit is 0.95 TFLOP in the head start, 0.82 in targets
and 0.90 in joint steps (batch 2, tiny decoder; counted as `examples.benchmark.step_cost` counts), so estimates are good
to about 15 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from echodistill_cli.config.schema import Config

_TRAINED = 2
# Decoding an image, and the way back through decoder and image encoders, in passes of SD's UNet.
_DECODED = {"full": 6.0, "tiny": 1.0}
HEAD_START, JOINT, CARRY_BACK = "head start", "training", "carry back"


@dataclass(frozen=True)
class PhaseCost:
    """What a phase of a run costs.

    Args:
        name: head start, training or carry back.
        steps: how many it has.
        each: passes of a step.
        before: passes before the first step.
    """

    name: str
    steps: int
    each: float
    before: float = 0.0


@dataclass(frozen=True)
class Work:
    """The passes of a run.

    Args:
        phases: in their order.
    """

    phases: tuple[PhaseCost, ...]

    @property
    def lengths(self) -> dict[str, int]:
        """The number of steps of each phase, by its name."""
        return {phase.name: phase.steps for phase in self.phases}

    def seconds_left(self, name: str, step: int, step_seconds: float) -> float:
        """Return how long a run still takes.

        Args:
            name: of the phase that it is in.
            step: the last finished step of that phase, from 1.
            step_seconds: mean duration of a step of that phase.
        """
        index = [phase.name for phase in self.phases].index(name)
        now, later = self.phases[index], self.phases[index + 1 :]
        passes = sum(phase.before + phase.steps * phase.each for phase in later)
        return ((now.steps - step) + passes / now.each) * step_seconds


def work_of(config: Config) -> Work:
    """Return how much a run computes.

    Args:
        config: of the run.
    """
    train, batch = config.train, config.train.batch_size
    trained = batch * (_TRAINED + config.train.gradient_checkpointing)
    teacher = trained * (1.5 if config.loss.prior else 1.0)
    target = _target(config)
    is_decoded = config.loss.identity or config.loss.adversarial or config.loss.sliced_wasserstein
    decoded = batch * _DECODED[config.model.decoder] if is_decoded else 0.0
    joint = teacher + trained + target + decoded + config.replays * trained + _echo(config)
    targets = train.first_targets * (target + batch) if config.replays else 0.0
    return Work(
        (
            PhaseCost(HEAD_START, train.head_start, teacher),
            PhaseCost(JOINT, train.steps, joint, before=targets),
            PhaseCost(CARRY_BACK, config.echo.carry_back, teacher),
        )
    )


def _target(config: Config) -> float:
    """Return the passes of a batch of targets; with guidance the teacher sees every sample twice."""
    train = config.train
    steps = max(1, round(train.target_strength * train.target_steps)) if train.target_steps > 1 else 1
    guided = 2 if train.guidance_scale > 1 else 1
    classes = 1 if config.replays and train.pair_share and config.concept.class_name else 0
    return train.batch_size * (steps * guided + classes)


def _echo(config: Config) -> float:
    """Return the passes of the echo, as a mean over joint steps; its images are decoded only."""
    images = refreshes(config) * config.echo.candidates
    return images * (1 + _DECODED[config.model.decoder] / 3) / config.train.steps


def refreshes(config: Config) -> int:
    """Return how often a run refreshes its echo pool."""
    echo = config.echo
    return 0 if echo.start is None else len(range(echo.start, config.train.steps + 1, echo.every))
