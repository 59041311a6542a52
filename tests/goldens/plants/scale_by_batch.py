"""Per-batch activation scale: activations are quantized by the greatest of the whole batch."""

import sys

import torch
import torch.nn.functional as F

from detinfer import cli
from detinfer.models.parallel import RowParallel


def forward(self, x):
    scale = x.abs().amax() / 127
    return F.linear(torch.round(x / scale) * scale, self.weight)


RowParallel.forward = forward
sys.exit(cli.run())
