"""One change at a time to `speedrun.py`: short runs that show, on the validation split, what each ingredient is worth.

python launch.py --config configs/ladder.py             # three epochs without a change
python launch.py --config configs/ladder.py:no_crop     # or another of CHANGES
"""

from typing import Any

from ml_collections import ConfigDict

from configs import best, final, speedrun

CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "muon": {"optim.name": "muon", "optim.weight_decay": 0.1},
    "nesterov": {"optim.name": "nesterov"},  # with best.py's rates
    "adamw": {"optim.name": "adamw"},  # with final.py's rates
    "no_whitening": {"model.stem": "cifar"},
    "relu": {"model.activation": "relu"},
    "no_smoothing": {"label_smoothing": 0.0},
    "late_pool": {"model.downsample": "pool"},
    "strides": {"model.downsample": "stride"},
    "random_flip": {"augment.flip": "random"},
    "black_border": {"augment.crop_fill": "black"},
    "no_crop": {"augment.crop_padding": 0},
    "colour_jitter": {"augment.brightness": 0.2, "augment.contrast": 0.2, "augment.saturation": 0.2},
    "rotation": {"augment.rotation_degrees": 15.0},
    "cosine": {"schedule.name": "warmup_cosine"},
    "mean_pool": {"model.global_pool": "mean"},
    "cutout": {"augment.cutout": 8},
    "mixup": {"augment.mixup_alpha": 0.2},
    "cutmix": {"augment.cutmix_alpha": 1.0},
    "trivial_augment": {"augment.policy": "trivial"},
    "average": {"optim.ema_decay": 0.95},
}


def get_config(change: str = "nothing") -> ConfigDict:
    """Return the config; fields that are not set here are as in `speedrun.py:tune`."""
    if change not in CHANGES:
        raise ValueError(f"ladder.py takes :{', :'.join(CHANGES)}, not :{change}")
    config = speedrun.get_config("tune")
    config.num_epochs = 3.0
    config.eval_every_epochs = 3
    if change == "nesterov":
        config.optim = best.get_config().optim
    if change == "adamw":
        config.optim = final.get_config().optim
    config.update_from_flattened_dict(CHANGES[change])
    return config
