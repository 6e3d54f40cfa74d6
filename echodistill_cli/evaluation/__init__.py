"""Scores of generated images, CLIP-I, DINO and CLIP-T: of one run, or of all subjects of DreamBench."""
