"""The size of a network: the limit of its parameters, the images that it takes, and how a run describes it."""

from typing import Any

from ml_collections import ConfigDict

from resnet_jax import train_state
from resnet_jax.errors import UserError


def check(num_params: int, max_params: int) -> None:
    """Refuse a model with more than `max_params` parameters; 0 means no limit."""
    if max_params and num_params > max_params:
        raise UserError(
            f"the model has {num_params:,} parameters, but config.model.max_params allows {max_params:,}: make "
            "config.model.channel_list or block_list smaller, or raise the budget (0 for none)"
        )


def check_images(model: ConfigDict, height: int, width: int) -> None:
    """Refuse images from which max-pools would leave no pixel, or that are smaller than the patches of a whitened layer."""
    least = 2 ** (len(model.channel_list) - 1) if model.downsample != "stride" else 1
    least = {"whitened": max(least, 3), "imagenet": 4 * least - 3}.get(model.stem, least)
    if min(height, width) < least:
        shorter = ", or make config.model.channel_list shorter" * (model.downsample != "stride")
        raise UserError(
            f"the images have {height}x{width} pixels, and config.model needs {least}x{least}: set config.data.image_size "
            f"to {least} or more{shorter}"
        )


def describe(params: Any, max_params: int, table: bool) -> str:
    """Describe the number of parameters in one line, after a table of all parameters if `table`."""
    budget = f" of {max_params:,} allowed (config.model.max_params)" if max_params else ""
    line = f"{train_state.num_params(params):,} trainable parameters{budget}"
    return f"{train_state.parameter_table(params)}\n{line}" if table else line
