"""The filters of a first layer that whitens patches of images: `config.model.stem = "whitened"`."""

import numpy as np
from ml_collections import ConfigDict

from resnet_jax.data.on_disk import Images

_IMAGES = 5000  # are enough for a covariance of 27 numbers
_EPSILON = 5e-4  # of Jordan's implementation: bounds the scale of directions that hardly vary


def filters(images: Images, data: ConfigDict, count: int) -> np.ndarray:
    """Return filters that give uncorrelated outputs of variance 1 on the 3x3 patches of normalised images (Page, 2018, part 8).

    They are the patches' principal directions, each divided by its standard deviation, from the largest on, and the negatives
    of all of them (Jordan, arXiv:2404.00498, section 3.2), so that the activation that follows loses nothing.

    Args:
        images: uint8 [N, H, W, 3], H and W at least 3. At most about 5,000 are read, at equal distances.
        data: `config.data`, whose mean and std normalise the images.
        count: of filters, even and at most 54.

    Returns:
        float32 [3, 3, 3, count]: the kernel of a convolution.
    """
    chosen = np.arange(0, len(images), -(-len(images) // _IMAGES))
    covariance, patches_seen = np.zeros((27, 27)), 0
    for some in np.array_split(chosen, -(-len(chosen) // 500)):
        x = (images[some].astype(np.float32) / 255 - np.float32(data.mean)) / np.float32(data.std)
        patches = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))  # [N, H - 2, W - 2, channel, row, column]
        patches = patches.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 27)
        covariance += (patches.T @ patches).astype(np.float64)
        patches_seen += len(patches)
    variances, directions = np.linalg.eigh(covariance / patches_seen)  # ascending
    kept = slice(None, -count // 2 - 1, -1)
    whitening = directions[:, kept] / np.sqrt(variances[kept] + _EPSILON)
    return np.concatenate([whitening, -whitening], axis=1).reshape(3, 3, 3, count).astype(np.float32)
