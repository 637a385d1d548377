"""The whole trainer in two minutes, offline: scikit-learn's digits, a small model, the same code path as `final.py`.

make run
"""

from ml_collections import ConfigDict

from configs import final


def get_config() -> ConfigDict:
    """Return the config; fields that are not set here are as in `final.py`."""
    config = final.get_config()
    config.batch_size = 64
    config.num_epochs = 30.0
    config.eval_every_epochs = 3
    config.log_every_steps = 20
    config.data.name = "digits"  # 1,797 images of 8x8 pixels
    config.data.mean = (0.3053, 0.3053, 0.3053)  # of the training images
    config.data.std = (0.3762, 0.3762, 0.3762)
    config.augment.flip_probability = 0.0  # a mirrored 2 is not a 2
    config.augment.crop_padding = 1
    config.model.channel_list = (16, 32, 64)
    config.model.block_list = (1, 1, 1)
    config.schedule.warmup_epochs = 3.0
    return config
