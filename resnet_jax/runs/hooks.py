"""What can watch a run without being part of its loop: a profile, a search that prunes, a benchmark."""

from pathlib import Path
from typing import Any

from resnet_jax.runs.plan import Call


class Hook:
    """The training loop calls these methods; each does nothing unless a subclass overrides it.

    An exception from a method ends the session at the last checkpoint. A returned text is shown to the user. Several
    processes of a run call the same hooks at the same places.
    """

    def check(self, first_step: int, total_steps: int) -> None:
        """Refuse a run from `first_step` to `total_steps` that it cannot watch.

        Called with 0 before anything is written, and again once the state is restored.
        """

    def begin(self, directory: Path) -> None:
        """The run in `directory` is about to take its first step of this session."""

    def before_call(self, call: Call, state: Any) -> None:
        """A call is about to be dispatched; it consumes `state`, the result of the call before, so keep no reference."""

    def after_dispatch(self, call: Call, metrics: Any) -> str:
        """A call was dispatched; its `metrics` are not ready yet."""
        return ""

    def after_call(self, call: Call) -> None:
        """A call is done and logged."""

    def on_validation(self, step: int, accuracy: float) -> None:
        """The run was validated after `step`; on resume, once for each validation of earlier sessions."""

    def on_stop(self, step: int) -> str:
        """The session is asked to stop after `step`, which is saved."""
        return ""
