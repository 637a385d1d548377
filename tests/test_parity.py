"""The report's architecture and recipe give what PyTorch's give: golden/make_architecture_parity.py, in float64.

In float64 ours differ by the roundings that the step makes to float32 on purpose: of the normalised images, the logits and
the loss. In float32, by those of 23 convolutions and as many batch norms.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

from resnet_jax import config as config_lib
from resnet_jax import steps, torch_weights, train_state

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "architecture_parity.npz"))
COUNTED = 16 * 32 * 32  # values that a statistic of the first stage is over


def part(prefix):
    return {name.removeprefix(prefix): array for name, array in GOLDEN.items() if name.startswith(prefix)}
