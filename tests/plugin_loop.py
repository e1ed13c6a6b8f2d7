"""`tiny_loop.py` under Accelerate's FSDP and DeepSpeed plugins over gloo; Accelerate runs them only on GPUs.

Accelerate is patched so that it assumes GPUs for the processes but uses the CPU as device.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import accelerate
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from omegaconf import OmegaConf

from train import components

os.environ |= {"ACCELERATE_USE_CPU": "false", "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
components.check_launch = lambda: None
barrier = torch.distributed.barrier
torch.distributed.barrier = lambda *_, **__: barrier()  # gloo does not support device arguments
accelerator = components.make_accelerator(OmegaConf.create({"seed": 0, "train": {"mixed_precision": "no"}}))
accelerate.Accelerator = lambda cpu: accelerator
runpy.run_path(str(Path(__file__).with_name("tiny_loop.py")), run_name="__main__")
