"""Photos in, augmented views and prompts out. Checking photos needs no torch."""

from echodistill_cli.data.photos import check_photos as check_photos
from echodistill_cli.data.photos import load_photos as load_photos
