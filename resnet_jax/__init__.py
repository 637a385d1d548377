"""resnet_jax: a small, exact, fast trainer for CIFAR-scale image classifiers in JAX and Flax."""

import time

STARTED = time.monotonic()  # seconds; from here a run reports how long it took to reach its first step
