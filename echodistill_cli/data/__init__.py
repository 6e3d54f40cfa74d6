"""Photos in, augmented views and prompts out."""
