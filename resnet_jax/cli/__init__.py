"""The command line: one command, with a tool for each task."""

from resnet_jax.runs.exits import exit_on_user_error

with exit_on_user_error():  # outside the project's environment, a missing package is one line
    import absl  # noqa: F401
    import ml_collections  # noqa: F401
