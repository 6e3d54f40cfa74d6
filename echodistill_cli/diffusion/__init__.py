"""Diffusion maths and the objects it acts on: noise schedule, conditioning, the model pair, sampling."""

from echodistill_cli.diffusion.pair import Denoiser as Denoiser
from echodistill_cli.diffusion.pair import ModelPair as ModelPair
from echodistill_cli.diffusion.sampling import SamplingSettings as SamplingSettings
from echodistill_cli.diffusion.sampling import generate as generate
from echodistill_cli.diffusion.sampling import student_x0 as student_x0
from echodistill_cli.diffusion.sampling import teacher_x0 as teacher_x0
from echodistill_cli.diffusion.schedule import NoiseSchedule as NoiseSchedule
