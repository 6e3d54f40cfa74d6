"""echodistill: personalize one-step text-to-image models by bidirectional concept distillation.

The public API under the project's name: `import echodistill` and `import echodistill_cli` give the same names. Each is
imported when it is first used, so that importing the package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import echodistill_cli
from echodistill_cli import __all__
from echodistill_cli import __version__ as __version__

if TYPE_CHECKING:
    from echodistill_cli import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in __all__:
        return getattr(echodistill_cli, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
