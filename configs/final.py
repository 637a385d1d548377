"""The report's model and recipe on CIFAR-10.

python launch.py --config configs/final.py          # 45,000 training images, 5,000 to choose the checkpoint
python launch.py --config configs/final.py:full     # all 50,000 training images, the last checkpoint
python launch.py --config configs/final.py:smoke    # the same code path in a few steps of a tiny model, on digits

Test accuracy: 93.42 ± 0.01 % (3 seeds), in 2 minutes on an H200; docs/results.md says more.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    """Return the config; "report" in a comment is a section of the report that the README names."""
    if variant not in ("", "full", "smoke"):
        raise ValueError(f"final.py takes :full or :smoke, not :{variant}")
    config = ConfigDict()
    config.seed = 0  # for the parameters, the order of the images and their augmentation
    config.init_from = ""  # "final-cifar10", a run or a .safetensors: the first weights; "" to draw them
    config.batch_size = 128  # images per step, over all devices; report 3b
    config.accumulation_steps = 1  # parts of a batch, one after another, whose gradients are averaged: less memory
    config.num_epochs = 50.0  # passes over the training images; report 3b
    config.label_smoothing = 0.0  # share of the target spread over all classes; not in the report
    config.class_weights = ""  # in the training loss: "1,2.5,..." by class, or "balanced" by its number of images
    config.eval_batch_size = 500  # images; changes only speed and memory
    config.eval_every_epochs = 1  # epochs between evaluations on validation, each with a save
    config.checkpoint_every_steps = 0  # also save every so many steps; 0 for never
    config.checkpoint_every_minutes = 5.0  # also save when the last save was so long ago; 0 for never
    config.log_every_steps = 50  # steps per row of metrics.jsonl, which holds their mean
    config.abort_grad_norm = 1e4  # stop if the gradient's global norm reaches this; 0 for no limit; nan always stops
    config.pipeline = "auto"  # "tf_data" on the host; "device": images in the accelerator's memory, where they fit
    config.steps_per_call = 0  # at most; device pipeline only; 0: 50 on accelerators, 1 on a CPU, where loops are slow

    config.data = ConfigDict()
    config.data.name = "cifar10"  # a TFDS name, digits, npz:FILE or folder:DIR
    config.data.data_dir = ""  # TFDS's folder; "" for TFDS_DATA_DIR or ~/tensorflow_datasets
    config.data.cache_dir = ""  # decoded images; "" for the user's cache folder
    config.data.image_size = 0  # pixels per side after scaling and cropping; 0 to keep the size
    config.data.num_threads = 0  # threads of TensorFlow; 0 for one per usable core
    config.data.validation_ratio = 0.0 if variant == "full" else 0.1  # of the training images; report 3b
    config.data.split_seed = 0  # for the validation split, which is the same for all values of `seed`
    # Of each channel of CIFAR-10's training images, 0..1; authors' notebook. For other data, (): computed from them.
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2471, 0.2435, 0.2616)  # likewise

    config.augment = ConfigDict()  # report 2c, with torchvision's semantics; 0 switches one off
    config.augment.flip_probability = 0.5  # left to right
    config.augment.flip = "random"  # or "alternating": each image every other epoch, arXiv:2404.00498
    config.augment.resized_crop_area = 0.0  # of a random crop, scaled to the whole image: least share; arXiv:1409.4842
    config.augment.crop_padding = 4  # pixels on every side before the random crop
    config.augment.crop_fill = "black"  # what they hold; or "reflect": the image mirrored
    config.augment.brightness = 0.2  # factor uniform in 1 +- this
    config.augment.contrast = 0.2  # likewise
    config.augment.saturation = 0.2  # likewise; the three in random order
    config.augment.policy = ""  # "cifar10": AutoAugment, as in the notebook; "trivial"; "rand-m9-n2"; report: none
    config.augment.rotation_degrees = 15.0  # angle uniform in +- this, nearest neighbour
    config.augment.cutout = 0  # side in pixels of a black square at a random place, arXiv:1708.04552; report: none
    config.augment.mixup_alpha = 0.0  # of the Beta distribution of mixup's shares, arXiv:1710.09412; report: none
    config.augment.cutmix_alpha = 0.0  # likewise of CutMix, arXiv:1905.04899; with both, each step draws one

    config.model = ConfigDict()
    config.model.block = "basic"  # or "bottleneck"; report, figure 6
    config.model.stem = "cifar"  # 3x3; or "imagenet": 7x7, stride 2, max-pool; report, figure 6; or "whitened"
    config.model.channel_list = (64, 128, 256, 512)  # of each stage; report 2e
    config.model.block_list = (3, 5, 3, 0)  # of each stage; report 2e
    # "stride": of a stage's first block; "pool" and "pool_first": a convolution and a max-pool before the block
    config.model.downsample = "stride"
    config.model.activation = "relu"  # or "gelu"
    config.model.global_pool = "mean"  # of the last stage's pixels; or "max"
    config.model.logit_scale = 1.0  # factor on the logits
    config.model.batch_norm_momentum = 0.9  # weight of the old statistic; PyTorch's default, 1 - 0.1
    config.model.batch_norm_epsilon = 1e-5  # PyTorch's default
    config.model.dtype = "auto"  # of the computation: "bfloat16" on accelerators, "float32" on a CPU
    config.model.max_params = 5_000_000  # larger models are refused; 0 for no limit; report 2e

    config.optim = ConfigDict()
    config.optim.name = "adamw"  # report 2b
    config.optim.learning_rate = 0.01  # highest value of the schedule; report 3b
    config.optim.backbone_rate = 1.0  # factor on the rate of all but the classifier; 0 trains the classifier alone
    config.optim.b1 = 0.9  # decay of the first moment; report 2b
    config.optim.b2 = 0.999  # of the second; report 2b
    config.optim.eps = 1e-8  # report 2b
    config.optim.weight_decay = 0.001  # decoupled; report 3b
    config.optim.decay_mask = "all"  # or "kernels": no decay of biases and batch norm; authors' notebook
    config.optim.max_grad_norm = 0.0  # clip the gradient's global norm to this; 0 for no clipping, as in the report
    config.optim.ema_decay = 0.0  # of the moving average of the weights, which is then evaluated; 0 for none

    config.schedule = ConfigDict()
    config.schedule.name = "warmup_cosine"  # report 2d
    config.schedule.warmup_epochs = 5.0  # authors' notebook
    config.schedule.restart_epochs = ()  # where it begins anew, without warm-up; --extend-to adds to it; report: none
    config.schedule.min_ratio = 0.001  # lowest rate / learning_rate; authors' notebook

    if variant == "smoke":
        config.data.name = "digits"
        config.num_epochs = 1.0
        config.schedule.warmup_epochs = 0.5
        config.log_every_steps = 5
        config.model.channel_list = (8, 16)
        config.model.block_list = (1, 1)
    return config
