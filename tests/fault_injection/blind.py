"""Run `launch.py`, in which the second process cannot read the checkpoint of one step: python blind.py STEP [flags]."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


def main() -> None:
    """Blind the second process, and begin."""
    blind = int(sys.argv.pop(1))
    import jax
    import orbax.checkpoint as ocp

    import launch
    from resnet_jax.cli import command_line

    restore = ocp.CheckpointManager.restore

    def read(self: Any, step: int, *arguments: Any, **named: Any) -> Any:
        if step == blind and jax.process_index() == 1:
            raise OSError("Stale file handle")
        return restore(self, step, *arguments, **named)

    ocp.CheckpointManager.restore = read  # type: ignore[method-assign]
    command_line.run(launch.main)


if __name__ == "__main__":
    main()
