"""The report's comparisons on a CPU: its shape with a quarter of its channels, images of 16x16 pixels, a fifth of the epochs.

python launch.py --config configs/narrow.py:adamw          # or sgd; adamw_plain, sgd_plain without augmentation
"""

from ml_collections import ConfigDict

from configs import final, sgd

_SHARE = 10 / 50  # of the report's epochs; its schedules are shortened alike


def get_config(variant: str = "adamw") -> ConfigDict:
    """The config; what is not here is as in `final.py` or `sgd.py`."""
    if variant not in ("adamw", "adamw_plain", "sgd", "sgd_plain"):
        raise ValueError(f"narrow.py takes :adamw, :adamw_plain, :sgd or :sgd_plain, not :{variant}")
    optimizer, _, plain = variant.partition("_")
    config = (final if optimizer == "adamw" else sgd).get_config()
    config.num_epochs *= _SHARE
    config.pipeline = "device"
    config.data.image_size = 16  # half of CIFAR-10's
    config.augment.crop_padding = 2
    if optimizer == "adamw":
        config.schedule.warmup_epochs *= _SHARE
    else:
        config.schedule.decay_every_epochs *= _SHARE
    if plain:
        for name, strength in config.augment.items():
            config.augment[name] = type(strength)()
    config.model.channel_list = (16, 32, 64, 128)
    return config
