"""Train or evaluate a run.

python launch.py --config configs/final.py [--workdir DIR]                 # train, or resume
python launch.py --config configs/final.py [--workdir DIR] --mode eval     # evaluate a checkpoint
"""

import time
from collections.abc import Sequence

from resnet_jax import command_line, commands
from resnet_jax.errors import UserError


def main(argv: Sequence[str]) -> None:
    """Do what the flags say."""
    started = time.monotonic()
    parser = command_line.ArgumentParser("python launch.py", __doc__)
    commands.add_train_arguments(parser)
    parser.add_argument("--mode", choices=("train", "eval"), default="train", help="default: train")
    commands.add_eval_arguments(parser)
    arguments, config = command_line.parse_config(parser, argv)
    if arguments.mode == "eval":
        if arguments.profile or arguments.max_seconds is not None:
            raise UserError("--profile and --max-seconds need --mode train")
        commands.start_evaluation(arguments, config, commands.workdir(arguments), arguments.distributed)
    else:
        if arguments.checkpoint or arguments.flip or arguments.fit_temperature:
            raise UserError("--checkpoint, --flip and --fit-temperature need --mode eval")
        commands.start_training(arguments, config, started)


if __name__ == "__main__":
    command_line.run(main)
