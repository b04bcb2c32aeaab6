"""Fail when the environment holds what this project must never pull in.

torchvision breaks transformers' image processors beside a CPU build of torch; nvidia-* wheels on a machine without
an NVIDIA device mean that the torch range resolved to a CUDA build of several gigabytes.
"""

import sys
from importlib.metadata import distributions

import torch

names = {dist.metadata["Name"].lower() for dist in distributions()}
wrong = {name for name in names if name == "torchvision"}
if not torch.cuda.is_available():
    wrong |= {name for name in names if name.startswith("nvidia-")}
if wrong:
    sys.exit(f"the environment holds {', '.join(sorted(wrong))}; see the dependency ranges in pyproject.toml")
print(f"{len(names)} packages, torch {torch.__version__}, no torchvision, no needless CUDA wheels")
