"""Write architecture_parity.npz: the report's architecture and recipe, narrow, in PyTorch and in float64.

    PYTHONPATH=. python tests/golden/make_architecture_parity.py     # needs PyTorch; run with 2.13.0

Four stages of [4, 8, 16, 32] channels and [3, 5, 3, 0] blocks with random weights and running statistics that are not those
of a fresh network; one batch of random images. Under "initial/" the state dict, then what PyTorch makes of it: logits in
eval mode, logits and "running/" statistics in train mode, the loss and its "gradient/", and the parameters "after/" five
steps of AdamW on that batch, with the report's schedule of two steps an epoch, one epoch of warm-up and three in all. The
test repeats it in JAX.

The gradient jumps where the input of a ReLU crosses zero, so an input that rounding alone can push across would make two
exact implementations differ at will. Of 200 seeds, that one is taken whose ReLU inputs all keep farthest from zero.
"""

import math
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch.nn import functional

from benchmarks import torch_step

MODEL = {
    "block": "basic",
    "stem": "cifar",
    "channel_list": [4, 8, 16, 32],
    "block_list": [3, 5, 3, 0],
    "downsample": "stride",
    "activation": "relu",
    "global_pool": "mean",
    "logit_scale": 1.0,
    "batch_norm_momentum": 0.9,
    "batch_norm_epsilon": 1e-5,
}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
BATCH, SIZE, CLASSES, STEPS = 4, 16, 10, 5
LEARNING_RATE, STEPS_PER_EPOCH, WARMUP_EPOCHS, EPOCHS, MIN_RATIO = 0.01, 2, 1, 3, 1e-3


def learning_rate(step: int) -> float:
    """The report's warm-up and cosine, its section 2d, in epochs."""
    epoch = step / STEPS_PER_EPOCH
    if epoch < WARMUP_EPOCHS:
        return LEARNING_RATE * epoch / WARMUP_EPOCHS
    lowest = MIN_RATIO * LEARNING_RATE
    done = (epoch - WARMUP_EPOCHS) / (EPOCHS - WARMUP_EPOCHS)
    return lowest + (LEARNING_RATE - lowest) / 2 * (1 + math.cos(math.pi * done))


def initial_weights(network: torch.nn.Module, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random float32 values for a network's state dict, counters left out."""
    weights = {}
    for name, tensor in network.state_dict().items():
        shape = tuple(tensor.shape)
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
            drawn = rng.uniform(0.5, 1.5, shape)
        elif tensor.ndim > 1:
            drawn = rng.normal(0.0, math.sqrt(2.0 / math.prod(shape[1:])), shape)
        else:
            drawn = rng.normal(0.0, 0.2, shape)
        weights[name] = drawn.astype(np.float32)
    return weights


def trajectory(seed: int) -> tuple[float, dict[str, np.ndarray]]:
    """The least distance of a ReLU's input from zero, and what the file holds."""
    rng = np.random.default_rng(seed)
    network = torch_step.ResNet(MODEL, CLASSES).double()
    images = rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, BATCH).astype(np.int32)
    initial = initial_weights(network, rng)
    golden = {"images": images, "labels": labels, **{f"initial/{name}": array for name, array in initial.items()}}
    network.load_state_dict({name: torch.tensor(array) for name, array in initial.items()}, strict=False)

    scaled = (images.astype(np.float32) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    x, y = torch.tensor(scaled.transpose(0, 3, 1, 2)).double(), torch.tensor(labels).long()
    with torch.no_grad():
        golden["eval_logits"] = network.eval()(x).numpy()
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.001)
    distances = []

    def noted_relu(x: torch.Tensor) -> torch.Tensor:
        distances.append(float(x.detach().abs().min()))
        return functional.relu(x)

    with mock.patch.object(torch_step, "functional", SimpleNamespace(relu=noted_relu)):
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = learning_rate(step)
            optimizer.zero_grad()
            logits = network(x)
            loss = functional.cross_entropy(logits, y)
            loss.backward()
            if step == 0:
                golden["train_logits"], golden["loss"] = logits.detach().numpy(), loss.detach().numpy()
                golden |= {f"running/{n}": b.numpy().copy() for n, b in network.named_buffers() if "running" in n}
                golden |= {f"gradient/{n}": p.grad.numpy().copy() for n, p in network.named_parameters()}
            optimizer.step()
    return min(distances), golden | {f"after/{name}": p.detach().numpy() for name, p in network.named_parameters()}


def main() -> None:
    """Write the file."""
    distance, golden = max((trajectory(seed) for seed in range(200)), key=lambda found: found[0])
    print(f"every ReLU's input is at least {distance:.1e} from zero")
    np.savez_compressed(Path(__file__).with_name("architecture_parity.npz"), **golden)


if __name__ == "__main__":
    main()
