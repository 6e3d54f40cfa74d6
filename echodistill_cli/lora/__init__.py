"""LoRA and token files, a library of its own: it knows no config, no run and no loaded model."""
