"""What is done with a trained LoRA: sample, export, merge, publish."""
