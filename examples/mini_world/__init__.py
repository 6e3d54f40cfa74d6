"""How the embedded teacher and student were made: a toy world and its trainer."""
