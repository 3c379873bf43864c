"""How a model is spread over devices. DeepSpeed is imported below this folder and nowhere else."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found nothing better
