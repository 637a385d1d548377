"""The report's network, trained on CIFAR-10, learns 72 handwritten digits in 15 steps.

python launch.py --config configs/finetune.py            # starts from the trained network
python launch.py --config configs/finetune.py:scratch    # the same steps from random weights

Test accuracy 71.2 ± 4.6 % and 33.5 ± 9.1 % (3 seeds each), in two minutes on two shared CPU cores.
"""

from ml_collections import ConfigDict

from configs import final


def get_config(variant: str = "") -> ConfigDict:
    """Return the config; fields that are not set here are as in `final.py`."""
    if variant not in ("", "scratch"):
        raise ValueError(f"finetune.py takes :scratch, not :{variant}")
    config = final.get_config()
    config.init_from = "" if variant else "final-cifar10"
    config.batch_size = 24  # a third of the images
    config.num_epochs = 5.0
    config.eval_every_epochs = 5  # at the end only: the validation split is large
    config.log_every_steps = 3
    config.pipeline = "device"

    config.data.name = "digits"
    config.data.image_size = 32  # as CIFAR-10's; mean and std are CIFAR-10's too
    config.data.validation_ratio = 0.95  # of 1,438 images: 72 are left to train on

    config.augment.flip_probability = 0.0  # a mirrored 2 is not a 2
    config.augment.crop_padding = 2
    config.augment.brightness = 0.0  # they have no colours
    config.augment.contrast = 0.0
    config.augment.saturation = 0.0

    config.optim.learning_rate = 0.001 if variant else 0.01  # the better of 0.001, 0.003 and 0.01 for each
    config.schedule.warmup_epochs = 1.0
    return config
