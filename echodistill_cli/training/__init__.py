"""The method: steps, losses, batches, targets, pools, critics, encoded photos, optimizers, state and loop.

To add a loss of the student: write a function in `losses` that returns one value per sample. Add a row to
`STUDENT_LOSSES` in `terms`, with a function that hands it what it compares. Add its weight to `LossConfig`, with 0 as
the default. Test the function on values worked out by hand in tests/training/test_losses.py.

For people who change the method, these names are stable; everything else here is internal.
"""

from echodistill_cli.training.state import TrainingState, build_state
from echodistill_cli.training.steps import (
    discriminator_step,
    echo_step,
    student_step,
    teacher_step,
    training_step,
)
from echodistill_cli.training.terms import STUDENT_LOSSES

__all__ = [
    "STUDENT_LOSSES",
    "TrainingState",
    "build_state",
    "discriminator_step",
    "echo_step",
    "student_step",
    "teacher_step",
    "training_step",
]
