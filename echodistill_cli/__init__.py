"""echodistill: personalize one-step text-to-image models by bidirectional concept distillation."""

__version__ = "0.1.0"
