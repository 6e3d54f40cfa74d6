"""CLIP-I, DINO and CLIP-T, of a run or of DreamBench."""
