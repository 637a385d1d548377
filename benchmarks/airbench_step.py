"""A training step of airbench94_muon on a CPU: the other side of `benchmarks.airbench`, in a Python that has PyTorch.

It runs the definitions of a clone's file with three changes: float32 instead of float16 and bfloat16, neither of which a
CPU has units for; the network and the images in channels_last, which is faster; and no torchvision, which it needs for
reading images. The recipe is that of the file: batches of 2,000, crops, mirrored every other epoch, two optimizers.
"""

import json
import sys
from typing import Any

import torch
from torch.nn import functional

from benchmarks import timing
from resnet_jax import host

BATCH_SIZE = 2000
_CHANGES = {
    ".half()": ".float()",
    "G.bfloat16()": "G.float()",
    "import torchvision\n": "",
    "import torchvision.transforms as T\n": "",
    "with open(sys.argv[0]) as f:\n    code = f.read()\n": "",
}


def definitions(source: str) -> dict[str, Any]:
    """Return the classes and functions of the file, up to its training loop."""
    for theirs, ours in _CHANGES.items():
        if theirs not in source:
            sys.exit(f"airbench94_muon.py does not hold {theirs!r}: take its commit f1c599c")
        source = source.replace(theirs, ours)
    names: dict[str, Any] = {}
    exec(compile(source[: source.index("def main(")], "airbench94_muon.py", "exec"), names)
    return names


def make_step(theirs: dict[str, Any]) -> Any:
    """Return a function that takes a training step on random images."""
    model = theirs["CifarNet"]()
    model.reset()
    model.to(memory_format=torch.channels_last).train()
    images = torch.randn(BATCH_SIZE, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    padded, labels = functional.pad(images, (2,) * 4, "reflect"), torch.randint(10, (BATCH_SIZE,))
    model.init_whiten(images)
    kernels = [p for p in model.parameters() if p.ndim == 4 and p.requires_grad]
    biases = [p for name, p in model.named_parameters() if "norm" in name and p.requires_grad]
    groups = [
        {"params": [model.whiten.bias], "lr": 0.053},
        {"params": biases, "lr": 0.053},
        {"params": [model.head.weight], "lr": 0.67},
    ]
    optimizers = [
        torch.optim.SGD(groups, momentum=0.85, nesterov=True, fused=True),
        theirs["Muon"](kernels, lr=0.24, momentum=0.6, nesterov=True),
    ]

    def step() -> None:
        batch = theirs["batch_crop"](padded, 32).flip(-1)
        functional.cross_entropy(model(batch), labels, label_smoothing=0.2, reduction="sum").backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    return step


def main() -> None:
    """Answer the lines of standard input."""
    torch.set_num_threads(host.usable_cores())
    torch.manual_seed(0)
    step = make_step(definitions(json.loads(sys.stdin.readline())["source"]))
    print(json.dumps({"version": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        print(timing.throughput(step, lambda done: done, BATCH_SIZE, float(line)), flush=True)


if __name__ == "__main__":
    main()
