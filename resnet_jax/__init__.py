"""resnet_jax: a small, exact, fast trainer for CIFAR-scale image classifiers in JAX and Flax."""
