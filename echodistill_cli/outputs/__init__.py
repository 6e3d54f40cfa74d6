"""What is done with a trained LoRA: sample, export and publish it."""
