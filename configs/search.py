"""A search near the report's network on CIFAR-10: fewer than 5 M parameters, each trained for ten epochs.

python -m resnet_jax search --config configs/search.py --study NAME
python -m resnet_jax search --config configs/search.py:cpu ...      # a quarter of the widths, 16x16 pixels, six epochs
python -m resnet_jax search --config configs/search.py:smoke ...    # the same code path in a minute, on digits
"""

from ml_collections import ConfigDict

from configs import final, narrow, quickstart

_CHANNELS = ((64, 128, 256, 512), (48, 96, 192, 384), (96, 128, 160, 192))
_BLOCKS = (
    (2, 2, 2, 2),
    (3, 4, 6, 3),
    (3, 5, 3, 0),
    (2, 2, 2, 0),
)  # ResNet-18, ResNet-34, the report, no last stage


def get_config(variant: str = "") -> ConfigDict:
    """Return the config; fields that are not set here are as in `final.py`, `narrow.py` or `quickstart.py`."""
    if variant not in ("", "cpu", "smoke"):
        raise ValueError(f"search.py takes :cpu or :smoke, not :{variant}")
    config = {"": final.get_config, "cpu": narrow.get_config, "smoke": quickstart.get_config}[variant]()
    if variant == "":
        config.num_epochs, config.schedule.warmup_epochs = 10.0, 1.0  # of each trial

    config.model.dtype = "float32"  # for all workers, whatever their devices are

    config.search = ConfigDict()
    config.search.objective = "accuracy"  # on validation; "accuracy_params", "accuracy_seconds" for a Pareto front
    config.search.max_gflops = 0.0  # forward pass of one image; 0 for no limit; model.max_params limits the parameters
    config.search.channel_lists = _CHANNELS  # grid: each of these lists
    config.search.block_lists = _BLOCKS  # with each of these
    config.search.reduction_factor = 3  # one trial in 3 continues after the first validation, the third, the ninth, ...
    config.search.refine_trials = 30  # trials within the budget
    config.search.width_range = 1.5  # channels of a stage: from the best / this to the best * this
    config.search.width_step = 8  # channels differ from the best by multiples of this
    config.search.block_range = 1  # blocks of a stage: at most this many more or fewer than the best
    config.search.learning_rate = (0.001, 0.03)  # log-uniform
    config.search.weight_decay = (1e-4, 0.1)  # log-uniform
    config.search.warmup_share = (0.02, 0.3)  # of the epochs
    config.search.confirm_top = 3  # best candidates to confirm, in addition to the config's own network
    config.search.confirm_seeds = 3  # config.seed + 1, ...: other seeds than the one that selected the candidates

    if variant == "cpu":
        config.num_epochs, config.schedule.warmup_epochs = 6.0, 0.6
        config.eval_every_epochs = 1
        config.model.max_params = 5_000_000 // 16  # narrow.py has a quarter of the report's channels
        config.search.channel_lists = tuple(tuple(c // 4 for c in channels) for channels in _CHANNELS)
        config.search.reduction_factor = 2
        config.search.refine_trials = 20
        config.search.width_step = 4
    elif variant == "smoke":
        config.num_epochs, config.schedule.warmup_epochs = 3.0, 0.5
        config.eval_every_epochs = 1
        config.model.max_params = 20_000
        config.search.channel_lists = ((8, 16, 16), (16, 32, 64))
        config.search.block_lists = ((1, 1, 0), (1, 1, 1))
        config.search.refine_trials = 3
        config.search.confirm_top = 2
        config.search.confirm_seeds = 2
    return config
