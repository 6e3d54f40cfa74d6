"""LoRA and token files: read, write, convert and explain them. Knows no config, no run and no loaded model."""

from echodistill_cli.lora.inspect import inspect_file as inspect_file
from echodistill_cli.lora.read import LoraFile as LoraFile
from echodistill_cli.lora.read import read_lora as read_lora
from echodistill_cli.lora.tensors import LoraWeights as LoraWeights
from echodistill_cli.lora.tensors import kohya_tensors as kohya_tensors
