"""Train or evaluate a run.

python launch.py --config configs/final.py [--workdir DIR]                 # train, or resume
python launch.py --config configs/final.py [--workdir DIR] --mode eval     # evaluate a checkpoint
"""

import time
from collections.abc import Sequence

from resnet_jax.cli import command_line, train_and_eval
from resnet_jax.errors import UserError


def main(argv: Sequence[str]) -> None:
    """Train or evaluate, depending on `--mode`."""
    started = time.monotonic()
    parser = command_line.ArgumentParser("python launch.py", __doc__)
    train_and_eval.add_train_arguments(parser)
    parser.add_argument("--mode", choices=("train", "eval"), default="train", help="default: train")
    train_and_eval.add_eval_arguments(parser)
    arguments, config = command_line.parse_config(parser, argv)
    if arguments.mode == "eval":
        if arguments.profile or arguments.max_seconds is not None or arguments.extend_to is not None:
            raise UserError("--profile, --max-seconds and --extend-to need --mode train")
        train_and_eval.start_evaluation(arguments, config, train_and_eval.workdir(arguments), arguments.distributed)
    else:
        if arguments.checkpoint or arguments.views > 1 or arguments.fit_temperature:
            raise UserError("--checkpoint, --views and --fit-temperature need --mode eval")
        train_and_eval.start_training(arguments, config, started)


if __name__ == "__main__":
    command_line.run(main)
