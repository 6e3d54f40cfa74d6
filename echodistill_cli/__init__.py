"""echodistill: personalize one-step text-to-image models by bidirectional concept distillation.

The names in `__all__` are the public API. They are imported when they are first used, so that importing the package
does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echodistill_cli.config.build import build_config, config_from_dict, config_to_toml
    from echodistill_cli.config.schema import Config
    from echodistill_cli.errors import (
        ConfigError,
        DeviceMemoryError,
        EchoDistillError,
        Interrupted,
        ModelError,
        PhotoError,
    )
    from echodistill_cli.pipeline import (
        BenchmarkRequest,
        EngineRequest,
        Evaluation,
        EvaluationRequest,
        ExportRequest,
        ExportResult,
        Many,
        ManyRequest,
        Sample,
        SampleRequest,
        TrainResult,
        benchmark,
        check,
        doctor,
        evaluate,
        export,
        inspect,
        plan,
        plan_many,
        sample,
        train,
        train_many,
        write_samples,
    )

__version__ = "0.3.0"
__all__ = [
    "BenchmarkRequest",
    "Config",
    "ConfigError",
    "DeviceMemoryError",
    "EchoDistillError",
    "EngineRequest",
    "Evaluation",
    "EvaluationRequest",
    "ExportRequest",
    "ExportResult",
    "Interrupted",
    "Many",
    "ManyRequest",
    "ModelError",
    "PhotoError",
    "Sample",
    "SampleRequest",
    "TrainResult",
    "__version__",
    "benchmark",
    "build_config",
    "check",
    "config_from_dict",
    "config_to_toml",
    "doctor",
    "evaluate",
    "export",
    "inspect",
    "plan",
    "plan_many",
    "sample",
    "train",
    "train_many",
    "write_samples",
]
_MODULES = ("pipeline", "config.build", "config.schema", "errors")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in __all__:
        for place in _MODULES:
            module = importlib.import_module(f"{__name__}.{place}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
