"""What a run does after which step: pure arithmetic, decided before the first step is taken."""

import dataclasses
import math
from collections.abc import Iterator
from fractions import Fraction

from ml_collections import ConfigDict

from resnet_jax.errors import UserError


def total_steps(config: ConfigDict, num_examples: int) -> int:
    """Return the fewest steps whose images are `num_epochs` epochs or more.

    `num_epochs` counts as the decimal that is written: 1.1 is 11/10. A quotient such as 2/3 is not an exact decimal, so
    one step fewer is taken if it gives the same float.
    """
    steps = math.ceil(Fraction(str(config.num_epochs)) * num_examples / config.batch_size)
    one_fewer = max(1, steps - 1)
    return one_fewer if one_fewer * config.batch_size / num_examples >= config.num_epochs else steps


@dataclasses.dataclass(frozen=True)
class Call:
    """Steps that are dispatched together: those after step `start`, through step `end`."""

    start: int
    end: int

    @property
    def count(self) -> int:
        """The number of steps."""
        return self.end - self.start


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which steps end a call, a row of the log, a save and an evaluation. Steps count from 1.

    Attributes:
        total_steps: the last step.
        batch_size: images a step.
        num_examples: images an epoch.
        eval_every_epochs: epochs between evaluations.
        checkpoint_every_steps: steps between saves; 0 saves only where the run evaluates.
        log_every_steps: steps between rows of the log.
    """

    total_steps: int
    batch_size: int
    num_examples: int
    eval_every_epochs: int
    checkpoint_every_steps: int
    log_every_steps: int

    @classmethod
    def from_config(cls, config: ConfigDict, num_examples: int) -> "Plan":
        """The plan of a run on so many training images; a UserError if its steps are too many to count in int32."""
        steps = total_steps(config, num_examples)
        if steps >= 2**31:
            raise UserError(f"config.num_epochs {config.num_epochs} takes {steps} steps: reduce it below 2**31")
        return cls(
            steps,
            config.batch_size,
            num_examples,
            config.eval_every_epochs,
            config.checkpoint_every_steps,
            config.log_every_steps,
        )

    @property
    def steps_per_epoch(self) -> float:
        """The steps whose images are an epoch, not rounded."""
        return self.num_examples / self.batch_size

    def warnings(self) -> list[str]:
        """What makes a run on little data train badly, with the numbers."""
        warnings = []
        if self.num_examples < self.batch_size:
            warnings.append(
                f"warning: a batch holds {self.batch_size} images, and there are only {self.num_examples} for training, so each "
                "comes several times in it: lower config.batch_size"
            )
        if self.total_steps < 10:
            warnings.append(
                f"warning: the run takes only {self.total_steps} steps of {self.batch_size} images: lower config.batch_size, or "
                "raise config.num_epochs"
            )
        return warnings

    def evaluates_after(self, step: int) -> bool:
        """Whether the run evaluates after a step: as each whole `eval_every_epochs` ends, and at the last step."""
        period = self.num_examples * self.eval_every_epochs  # images
        ends_period = step * self.batch_size // period > (step - 1) * self.batch_size // period
        return ends_period or step == self.total_steps

    def saves_after(self, step: int) -> bool:
        """Whether the run saves after a step, to evaluate or in between."""
        every = self.checkpoint_every_steps
        return self.evaluates_after(step) or (every > 0 and step % every == 0)

    def logs_after(self, step: int) -> bool:
        """Whether a row of the log ends with a step."""
        return step % self.log_every_steps == 0 or step == self.total_steps

    def measures_speed(self, call: Call) -> bool:
        """Whether a call holds a step that ends a full row, `log_every_steps` long."""
        return call.end // self.log_every_steps > call.start // self.log_every_steps

    def steps_per_call(self, most: int) -> int:
        """The steps of a call: the number, up to `most`, with which fewest calls lie between two saves.

        Epochs of a number of steps that is not whole count as the shorter ones.
        """
        epochs = self.num_examples * self.eval_every_epochs // self.batch_size
        gap = min(steps for steps in (epochs, self.checkpoint_every_steps, self.total_steps) if steps)
        return min(range(min(most, gap), 0, -1), key=lambda steps: gap // steps + gap % steps)

    def calls(self, first_step: int, most_steps: int) -> Iterator[Call]:
        """The calls from `first_step` to the end, of at most `most_steps` steps.

        A call takes `steps_per_call` steps, or 1 where a save would come before its end. So a call never goes past a
        save, only two lengths are compiled, and the steps that follow a save are cut into calls as in the run that was
        not stopped there.
        """
        step, steps_per_call = first_step, self.steps_per_call(most_steps)
        while step < self.total_steps:
            saves_within = any(map(self.saves_after, range(step + 1, step + steps_per_call)))
            call = Call(step, step + (1 if saves_within else steps_per_call))
            yield call
            step = call.end
