"""Write optimizer_trajectories.json: ten steps of PyTorch's AdamW and SGD on a small problem.

    python tests/golden/make_optimizer_trajectories.py     # needs PyTorch; run with 2.13.0

The problem: minimise sum(sin(A theta) * c) + 0.5 * |theta|^2 over theta of shape [3, 2] and bias [2], in float64, with a
learning rate that changes at every step. The test repeats it in JAX.
"""

import json
from pathlib import Path

import torch

KERNEL = [[0.5, -1.25], [2.0, 0.1], [-0.3, 0.7]]
BIAS = [0.2, -0.4]
LEARNING_RATES = [0.002 * (step + 1) for step in range(5)] + [
    0.01 * 0.7**step for step in range(5)
]  # as high as the report's
OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.001}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.001}),
}


def loss(kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A smooth function whose gradient changes from step to step."""
    return (torch.sin(3.0 * kernel) * torch.tensor([1.0, -2.0], dtype=kernel.dtype)).sum() + (
        0.5 * ((kernel + bias) ** 2).sum()
    )


def trajectory(name: str) -> list[dict[str, list]]:
    """Parameters after each step."""
    kernel = torch.tensor(KERNEL, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(BIAS, dtype=torch.float64, requires_grad=True)
    cls, arguments = OPTIMIZERS[name]
    optimizer = cls([kernel, bias], lr=LEARNING_RATES[0], **arguments)
    steps = []
    for learning_rate in LEARNING_RATES:
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.zero_grad()
        loss(kernel, bias).backward()
        optimizer.step()
        steps.append({"kernel": kernel.tolist(), "bias": bias.tolist()})
    return steps


if __name__ == "__main__":
    golden = {
        "torch": torch.__version__,
        "initial": {"kernel": KERNEL, "bias": BIAS},
        "learning_rates": LEARNING_RATES,
        **{name: trajectory(name) for name in OPTIMIZERS},
    }
    Path(__file__).with_name("optimizer_trajectories.json").write_text(json.dumps(golden, indent=1) + "\n")
