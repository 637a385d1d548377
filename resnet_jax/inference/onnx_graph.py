"""Build the ONNX graph of a network layer by layer: images uint8 [N, H, W, 3] -> logits float32 [N, classes]."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from resnet_jax.inference.trained_model import Model

OPSETS = range(13, 22)  # in which each operation below means the same


class _Graph:
    """The nodes and weights of a graph under construction.

    Args:
        model: the network.
        fold: fold batch norm into the convolution right before it.
    """

    def __init__(self, model: "Model", fold: bool) -> None:
        self.config, self.fold = model.config.model, fold
        variables = jax.device_get(model.variables)
        self.params, self.stats = variables["params"], variables["batch_stats"]
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        if self.config.activation == "gelu":
            self.weight("gelu/linear", np.array(np.sqrt(8 / np.pi)))
            self.weight("gelu/cubic", np.array(np.sqrt(8 / np.pi) * 0.044715))

    def add(self, operation: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; return the name of its output."""
        output = f"{operation.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, inputs, [output], **attributes))
        return output

    def weight(self, name: str, value: np.ndarray) -> str:
        """Add a weight; return its name."""
        self.weights.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def conv_norm(self, x: str, module: tuple[str, ...], conv: str, norm: str, stride: int, pool: bool = False) -> str:
        """Add a convolution without bias, padded by half its kernel, and batch norm with the running statistics.

        A max-pool between the two keeps them apart: the largest of several pixels is not that after a negative scale.
        """
        params, stats, name = self.params, self.stats, "/".join((*module, conv))
        for part in module:
            params, stats = params[part], stats[part]
        kernel = np.transpose(np.asarray(params[conv]["kernel"], np.float64), (3, 2, 0, 1))  # HWIO -> OIHW
        mean, variance = (np.asarray(stats[norm][key], np.float64) for key in ("mean", "var"))
        scale, bias = (np.asarray(params[norm][key], np.float64) for key in ("scale", "bias"))
        half = kernel.shape[-1] // 2
        shape = {"strides": [stride, stride], "pads": [half] * 4}
        if self.fold and not pool:
            factor = scale / np.sqrt(variance + self.config.batch_norm_epsilon)
            folded = self.weight(f"{name}/kernel", kernel * factor[:, None, None, None])
            return self.add("Conv", x, folded, self.weight(f"{name}/bias", bias - mean * factor), **shape)
        x = self.add("Conv", x, self.weight(f"{name}/kernel", kernel), **shape)
        x = self.max_pool(x) if pool else x
        figures = {"scale": scale, "bias": bias, "mean": mean, "var": variance}
        names = [self.weight(f"{'/'.join((*module, norm))}/{key}", value) for key, value in figures.items()]
        return self.add("BatchNormalization", x, *names, epsilon=self.config.batch_norm_epsilon)

    def max_pool(self, x: str) -> str:
        """Add the maximum of each 2x2 pixels."""
        return self.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])

    def activate(self, x: str) -> str:
        """Add the network's activation; GELU, an operation of opset 20 only, as z * sigmoid(2 sqrt(2 / pi) (z + 0.044715 z^3))."""
        if self.config.activation == "relu":
            return self.add("Relu", x)
        factor = self.add("Add", "gelu/linear", self.add("Mul", "gelu/cubic", self.add("Mul", x, x)))
        return self.add("Mul", x, self.add("Sigmoid", self.add("Mul", x, factor)))

    def block(self, x: str, name: str, stride: int) -> str:
        """Add a residual block; the stride applies to the first 3x3 convolution and to the shortcut."""
        convs = sorted(key for key in self.params[name] if key.startswith("conv"))
        y = x
        for conv in convs:
            strided = conv == ("conv1" if self.config.block == "basic" else "conv2")
            y = self.conv_norm(y, (name,), conv, f"norm{conv[-1]}", stride if strided else 1)
            if conv != convs[-1]:
                y = self.activate(y)
        if "shortcut_conv" in self.params[name]:
            x = self.conv_norm(x, (name,), "shortcut_conv", "shortcut_norm", stride)
        return self.activate(self.add("Add", y, x))

    def views(self, x: str, views: int) -> tuple[str, list[float]]:
        """Join the views of images [N, C, H, W] to [views * N, C, H, W]; return also the weight of each view.

        They are those of `steps.average_over_views`.
        """
        places, shares = [x], [1.0]
        if views == 6:
            padded = self.add("Pad", x, self.integers("pads", [0, 0, 1, 1, 0, 0, 1, 1]), mode="reflect")
            axes = self.integers("axes", [2, 3])
            for name, first, last in (("upper", 0, -2), ("lower", 2, 2**31)):
                corners = [self.integers(f"{name}_{end}", [at, at]) for end, at in (("first", first), ("last", last))]
                places.append(self.add("Slice", padded, *corners, axes))
            shares = [1 / 2, 1 / 4, 1 / 4]
        from_right = {"first": -1, "last": -(2**31), "axis": 3, "step": -1}
        mirror = [self.integers(f"mirror_{name}", [value]) for name, value in from_right.items()]
        mirrored = [self.add("Slice", place, *mirror) for place in places]
        return self.add("Concat", *places, *mirrored, axis=0), [share / 2 for share in [*shares, *shares]]

    def average(self, logits: str, shares: list[float], num_classes: int) -> None:
        """Average logits [views * N, num_classes] over the views, as the graph's output."""
        by_view = self.add("Reshape", logits, self.integers("by_view", [len(shares), -1, num_classes]))
        weighted = self.add("Mul", by_view, self.weight("shares", np.reshape(shares, (-1, 1, 1))))
        axis = self.integers("view", [0])
        self.nodes.append(helper.make_node("ReduceSum", [weighted, axis], ["logits"], keepdims=0))

    def integers(self, name: str, values: list[int]) -> str:
        """Add a constant of integers; return its name."""
        self.weights.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name


def build(model: "Model", fold: bool, opset: int, views: int = 1) -> onnx.ModelProto:
    """Build the graph of a network.

    Args:
        model: the network.
        fold: fold batch norm into the convolution right before it.
        opset: one of `OPSETS`.
        views: of each image, whose logits the graph averages: `steps.average_over_views`.
    """
    graph, config = _Graph(model, fold), model.config
    x = graph.add("Cast", "images", to=TensorProto.FLOAT)
    mean, std = (255 * np.array(value).reshape(1, 1, 1, 3) for value in (config.data.mean, config.data.std))
    x = graph.add("Div", graph.add("Sub", x, graph.weight("mean", mean)), graph.weight("std", std))
    x = graph.add("Transpose", x, perm=[0, 3, 1, 2])
    shares = [1.0]
    if views > 1:
        x, shares = graph.views(x, views)
    imagenet = config.model.stem == "imagenet"
    x = graph.activate(graph.conv_norm(x, (), "stem_conv", "stem_norm", 2 if imagenet else 1))
    if imagenet:
        x = graph.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for i, blocks in enumerate(config.model.block_list, start=1):
        pools, early = i > 1 and config.model.downsample != "stride", config.model.downsample == "pool_first"
        if pools:
            x = graph.conv_norm(x, (), f"stage{i}_conv", f"stage{i}_norm", 1, pool=early)
            x = graph.activate(x)
            x = x if early else graph.max_pool(x)
        for j in range(1, blocks + 1):
            x = graph.block(x, f"stage{i}_block{j}", 2 if i > 1 and j == 1 and not pools else 1)
    pool = {"mean": "GlobalAveragePool", "max": "GlobalMaxPool"}[config.model.global_pool]
    x = graph.add("Flatten", graph.add(pool, x))
    classifier = graph.params["classifier"]
    kernel, bias = (graph.weight(f"classifier/{key}", classifier[key]) for key in ("kernel", "bias"))
    scale = {"alpha": config.model.logit_scale, "beta": config.model.logit_scale}
    output = "logits" if views == 1 else "logits_of_views"
    graph.nodes.append(helper.make_node("Gemm", [x, kernel, bias], [output], **scale))
    if views > 1:
        graph.average(output, shares, len(model.class_names))
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", *model.image_shape])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", len(model.class_names)])
    graph_proto = helper.make_graph(graph.nodes, "resnet", [images], [logits], graph.weights)
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph_proto, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
