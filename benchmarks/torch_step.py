"""The same model in PyTorch: a training step for `benchmarks.benchmark`, logits for `benchmarks.exports`.

    python -m benchmarks.torch_step        # in the repository, with any Python that has PyTorch

It is a separate process, so that PyTorch and JAX share no threads, allocator or CUDA libraries. It reads one line of
JSON, {"config": as in results/*.json, "num_classes": N, "image_shape": [H, W, 3], "mode": "train" or "predict"}, and
answers with one line of JSON that describes the network. Each further line is a number of seconds to measure for; the answer is
the images/s.

On a CPU: channels_last, float32 or autocast to bfloat16, one thread per usable core. On a GPU: channels_last,
`torch.compile`, TF32 or autocast to bfloat16, fused optimizer.
"""

import io
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks import timing
from resnet_jax import host


def activate(activation: str, x: torch.Tensor) -> torch.Tensor:
    """Apply one of `models.ACTIVATIONS`."""
    return functional.relu(x) if activation == "relu" else functional.gelu(x, approximate="tanh")


class ConvMaxPool(nn.Conv2d):
    """A convolution and a 2x2 max-pool."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply both."""
        return functional.max_pool2d(super().forward(x), 2)


class BasicBlock(nn.Module):
    """3x3 conv, BN, activation, 3x3 conv, BN, plus the shortcut, activation."""

    expansion = 1

    def __init__(
        self, inputs: int, channels: int, stride: int, norm: Callable[[int], nn.Module], activation: str
    ) -> None:
        super().__init__()
        self.activation = activation
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.shortcut = _shortcut(inputs, channels, stride, norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block."""
        y = activate(self.activation, self.bn1(self.conv1(x)))
        return activate(self.activation, self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided), 1x1 convs with BN, plus the shortcut."""

    expansion = 4

    def __init__(
        self, inputs: int, channels: int, stride: int, norm: Callable[[int], nn.Module], activation: str
    ) -> None:
        super().__init__()
        self.activation = activation
        outputs = channels * self.expansion
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn3 = norm(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block."""
        y = activate(self.activation, self.bn1(self.conv1(x)))
        y = activate(self.activation, self.bn2(self.conv2(y)))
        return activate(self.activation, self.bn3(self.conv3(y)) + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """Return the identity, or a 1x1 conv and BN if the block changes the shape."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))


class ResNet(nn.Module):
    """The network of `config.model`, with the names of the report's own code: conv1, bn1, layer1.0.conv1 ... fc."""

    def __init__(self, config: dict[str, Any], num_classes: int) -> None:
        super().__init__()
        norm = partial(nn.BatchNorm2d, eps=config["batch_norm_epsilon"], momentum=1.0 - config["batch_norm_momentum"])
        block = {"basic": BasicBlock, "bottleneck": Bottleneck}[config["block"]]
        width = config["channel_list"][0]
        if config["stem"] == "imagenet":
            self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        else:
            self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = norm(width)
        for layer in (self.conv1, self.bn1):
            layer.requires_grad_(config["stem"] != "whitened")
        self.num_layers, self.activation = len(config["block_list"]), config["activation"]
        for i, (channels, blocks) in enumerate(zip(config["channel_list"], config["block_list"], strict=True)):
            down, layer, pools = nn.Sequential(), nn.Sequential(), i > 0 and config["downsample"] != "stride"
            if pools:
                outputs = channels * block.expansion
                early = config["downsample"] == "pool_first"
                conv = (ConvMaxPool if early else nn.Conv2d)(width, outputs, 3, padding=1, bias=False)
                activation = nn.ReLU() if self.activation == "relu" else nn.GELU("tanh")
                down.extend([conv, norm(outputs), activation, nn.Identity() if early else nn.MaxPool2d(2)])
                width = outputs
            for j in range(blocks):
                layer.append(block(width, channels, 2 if i > 0 and j == 0 and not pools else 1, norm, self.activation))
                width = channels * block.expansion
            self.add_module(f"down{i + 1}", down)
            self.add_module(f"layer{i + 1}", layer)
        self.global_pool, self.logit_scale = config["global_pool"], config["logit_scale"]
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map normalised images [B, 3, H, W] to logits [B, num_classes]."""
        x = self.maxpool(activate(self.activation, self.bn1(self.conv1(x))))
        for i in range(self.num_layers):
            x = getattr(self, f"layer{i + 1}")(getattr(self, f"down{i + 1}")(x))
        return self.fc(x.amax((2, 3)) if self.global_pool == "max" else x.mean((2, 3))) * self.logit_scale


def make_optimizer(model: nn.Module, config: dict[str, Any]) -> torch.optim.Optimizer:
    """Return the fused optimizer of `config.optim`, without a schedule, which does not change the speed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    kernels = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]
    decay = config["weight_decay"]
    groups = [
        {"params": kernels, "weight_decay": decay},
        {"params": others, "weight_decay": decay if config["decay_mask"] == "all" else 0.0},
    ]
    if config["name"] == "adamw":
        betas = (config["b1"], config["b2"])
        return torch.optim.AdamW(groups, lr=config["learning_rate"], betas=betas, eps=config["eps"], fused=True)
    kind = {"nesterov": True} if config["name"] == "nesterov" else {"dampening": config["dampening"]}
    return torch.optim.SGD(groups, lr=config["learning_rate"], momentum=config["momentum"], fused=True, **kind)


def make_normalise(config: dict[str, Any], device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from uint8 [B, H, W, 3] to normalised float32 [B, 3, H, W] in channels_last format."""
    mean, std = (torch.tensor(config["data"][name], device=device).view(1, 3, 1, 1) for name in ("mean", "std"))
    return lambda images: (images.permute(0, 3, 1, 2).float() / 255.0 - mean) / std


def make_prediction(model: nn.Module, config: dict[str, Any], images: torch.Tensor) -> Any:
    """Return a function that computes the logits of uint8 [B, H, W, 3] images and copies them to the host."""
    normalise = make_normalise(config, images.device)
    bfloat16 = config["model"]["dtype"] == "bfloat16"

    def predict() -> None:
        with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
            model(normalise(images)).float().numpy(force=True)

    return predict


def make_step(model: nn.Module, config: dict[str, Any], images: torch.Tensor, labels: torch.Tensor) -> Any:
    """Return a training step on a batch in the device's memory.

    Args:
        model: on the device, channels_last.
        config: the whole config.
        images: uint8 [B, H, W, 3].
        labels: int64 [B].

    Returns:
        A function that dispatches the step and returns what `wait` takes.
    """
    device = images.device
    normalise = make_normalise(config, device)
    optimizer = make_optimizer(model, config["optim"])
    max_norm = config["optim"]["max_grad_norm"]
    bfloat16 = config["model"]["dtype"] == "bfloat16"

    def loss_of_batch() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(normalise(images))
        return functional.cross_entropy(logits.float(), labels, label_smoothing=config["label_smoothing"])

    compiled = torch.compile(loss_of_batch) if device.type == "cuda" else loss_of_batch

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        compiled().backward()
        if max_norm > 0:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        return torch.cuda.current_stream().record_event() if device.type == "cuda" else None

    return step


def wait(event: Any) -> None:
    """Wait for a dispatched step; on a CPU, it is already done."""
    if event is not None:
        event.synchronize()


def main() -> None:
    """Answer the lines of standard input."""
    spec = json.loads(sys.stdin.readline())
    config, (height, width, _) = spec["config"], spec["image_shape"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(host.usable_cores())
    torch.set_float32_matmul_precision("high")  # TF32, if the GPU supports it
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    model = ResNet(config["model"], spec["num_classes"]).to(device, memory_format=torch.channels_last)
    model.train(spec["mode"] == "train")
    images = torch.randint(256, (config["batch_size"], height, width, 3), dtype=torch.uint8, device=device)
    labels = torch.randint(spec["num_classes"], (config["batch_size"],), device=device)
    if spec["mode"] == "train":
        step = make_step(model, config, images, labels)
    else:
        step = make_prediction(model, config, images)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    description = {
        "version": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "compiled": device.type == "cuda" and spec["mode"] == "train",
        "num_params": sum(p.numel() for p in model.parameters()),
        "bytes": file.tell(),
    }
    print(json.dumps(description), flush=True)
    for line in sys.stdin:
        print(timing.throughput(step, wait, config["batch_size"], float(line)), flush=True)


if __name__ == "__main__":
    main()
