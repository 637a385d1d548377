"""Found by `python -m resnet_jax search`, study cpu: 70.95 ± 1.36 % on validation, 3 seeds.

python launch.py --config configs/found_cpu.py    # as in the search; --config.num_epochs=50.0 trains for longer
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config, whole."""
    config = ConfigDict()
    config.abort_grad_norm = 10000.0
    config.accumulation_steps = 1
    config.augment = ConfigDict()
    config.augment.brightness = 0.2
    config.augment.contrast = 0.2
    config.augment.crop_fill = "black"
    config.augment.crop_padding = 2
    config.augment.cutmix_alpha = 0.0
    config.augment.cutout = 0
    config.augment.flip = "random"
    config.augment.flip_probability = 0.5
    config.augment.mixup_alpha = 0.0
    config.augment.policy = ""
    config.augment.resized_crop_area = 0.0
    config.augment.rotation_degrees = 15.0
    config.augment.saturation = 0.2
    config.batch_size = 128
    config.checkpoint_every_minutes = 0.0
    config.checkpoint_every_steps = 500
    config.class_weights = ""
    config.data = ConfigDict()
    config.data.cache_dir = ""
    config.data.data_dir = ""
    config.data.image_size = 16
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.name = "cifar10"
    config.data.num_threads = 0
    config.data.split_seed = 0
    config.data.std = (0.2471, 0.2435, 0.2616)
    config.data.validation_ratio = 0.1
    config.eval_batch_size = 500
    config.eval_every_epochs = 1
    config.init_from = ""
    config.label_smoothing = 0.0
    config.log_every_steps = 50
    config.model = ConfigDict()
    config.model.batch_norm_epsilon = 1e-05
    config.model.batch_norm_momentum = 0.9
    config.model.block = "basic"
    config.model.block_list = (2, 3, 1, 0)
    config.model.channel_list = (24, 48, 88, 128)
    config.model.downsample = "stride"
    config.model.dtype = "float32"
    config.model.activation = "relu"
    config.model.global_pool = "mean"
    config.model.logit_scale = 1.0
    config.model.max_params = 0
    config.model.stem = "cifar"
    config.num_epochs = 6.0
    config.optim = ConfigDict()
    config.optim.backbone_rate = 1.0
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.decay_mask = "all"
    config.optim.ema_decay = 0.0
    config.optim.eps = 1e-08
    config.optim.learning_rate = 0.011976523750753218
    config.optim.max_grad_norm = 0.0
    config.optim.name = "adamw"
    config.optim.weight_decay = 0.003329892634666896
    config.pipeline = "device"
    config.schedule = ConfigDict()
    config.schedule.min_ratio = 0.001
    config.schedule.name = "warmup_cosine"
    config.schedule.restart_epochs = ()
    config.schedule.warmup_epochs = 0.5479290851681042
    config.seed = 0
    config.steps_per_call = 0
    return config


# 8b04b859b7327ff74f92d22aa81a30ec2a74f8bc5b9eee118e608b2e85a47662, of the lines above: an edited file is not written over
