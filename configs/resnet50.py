"""ResNet-50 on ImageNet-1k at 224x224 pixels: 90 epochs of SGD with Nesterov's momentum; nobody has trained it yet.

python launch.py --config configs/resnet50.py                                      # TFDS's imagenet2012
python launch.py --config configs/resnet50.py --config.data.name=folder:data/imagenet
"""

from ml_collections import ConfigDict

from configs import final


def get_config() -> ConfigDict:
    """Return the config; fields that are not set here are as in `final.py`.

    It follows Goyal et al., arXiv:1706.02677, but for a cosine, label smoothing, batch-norm scales that all begin at 1, and
    crops of the scaled image instead of the photo.
    """
    config = final.get_config()
    config.batch_size = 1024
    config.num_epochs = 90.0  # section 5.1
    config.label_smoothing = 0.1  # Szegedy et al., arXiv:1512.00567, section 7
    config.eval_batch_size = 1000

    config.data.name = "imagenet2012"
    config.data.image_size = 224
    # The set's own validation split is the test set, and the last checkpoint is the result.
    config.data.validation_ratio = 0.0
    config.data.mean = (0.485, 0.456, 0.406)  # torchvision's
    config.data.std = (0.229, 0.224, 0.225)  # likewise

    config.augment.resized_crop_area = 0.08  # Szegedy et al., arXiv:1409.4842, section 6
    config.augment.crop_padding = 0  # the resized crop takes its place
    config.augment.brightness = 0.0
    config.augment.contrast = 0.0
    config.augment.saturation = 0.0
    config.augment.rotation_degrees = 0.0

    config.model.block = "bottleneck"
    config.model.stem = "imagenet"
    config.model.block_list = (3, 4, 6, 3)
    config.model.max_params = 0  # 25,557,032 with 1,000 classes

    config.optim = ConfigDict()
    config.optim.name = "nesterov"
    config.optim.learning_rate = 0.4  # 0.1 for 256 images, section 2.1
    config.optim.backbone_rate = 1.0
    config.optim.momentum = 0.9  # section 5.1
    config.optim.weight_decay = 1e-4  # section 5.1
    config.optim.decay_mask = "kernels"  # not batch norm, section 5.1
    config.optim.max_grad_norm = 0.0
    config.optim.ema_decay = 0.0

    config.schedule.min_ratio = 0.0  # after a warm-up of five epochs, section 2.2
    return config
