"""The one command: `python -m resnet_jax TOOL ...`, or `resnet-jax TOOL ...` where the package is installed."""

from resnet_jax.cli.tools import run

if __name__ == "__main__":
    run()
