"""`result.json`: what a complete run reports."""

import dataclasses
from pathlib import Path
from typing import Any

from resnet_jax.disk import files
from resnet_jax.errors import UserError

_NUMBER = (int, float)
_NONE = type(None)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The result of a run, as `result.json` holds it.

    Attributes:
        test_accuracy: of the checkpoint of `checkpoint_step`, 0..1; None where the run was not tested.
        test_loss: the mean cross-entropy on the same images.
        validation_accuracy: of that checkpoint, 0..1; None without a validation split.
        num_params: trainable parameters.
        checkpoint_step: the step of the best checkpoint.
        steps: of the run.
        seconds: wall time of all sessions; an interrupted one counts up to its last checkpoint.
        config: of the run, as JSON.
        dataset: {"name", "fingerprint", "splits": {name: number of images}}.
        environment: of the last session, from `environment.collect`.
        state_digest: SHA-256 of parameters, batch statistics and optimizer state after the last step.
        seed: `config.seed`.
        startup_seconds: from the start of the last session to the dispatch of its first step; None if it took no step.
        peak_memory_bytes: {"host", "device"} of the last session; None where the system does not say.
        initial_weights: of the weights that the run started from, {"file", "sha256"} for those of `weights load`, and
            {"origin", "checkpoint_step", "sha256", "classifier"} for those of `config.init_from`; None if drawn from the
            seed.
    """

    test_accuracy: float | None
    test_loss: float | None
    validation_accuracy: float | None
    num_params: int
    checkpoint_step: int
    steps: int
    seconds: float
    config: dict[str, Any]
    dataset: dict[str, Any]
    environment: dict[str, Any]
    state_digest: str
    seed: int = 0
    startup_seconds: float | None = None
    peak_memory_bytes: dict[str, Any] = dataclasses.field(default_factory=dict)
    initial_weights: dict[str, Any] | None = None

    @classmethod
    def read(cls, directory: Path, hint: str = "choose another --workdir") -> "RunResult":
        """Read the result of a run; `hint` says what to do where it cannot be read.

        Raises:
            UserError: if there is no result, it lacks a field, or a field has the wrong type.
        """
        path = directory / "result.json"
        if not path.exists():
            raise UserError(
                f"{directory} is not a complete run: it has no result.json. Finish it first, or give another run"
            )
        required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
        values = files.read_json(path, required, hint)
        result = cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})
        for name, types in _TYPES.items():
            if not isinstance(getattr(result, name), types) or isinstance(getattr(result, name), bool):
                raise UserError(f"{path} cannot be used ({name} is {getattr(result, name)!r}): {hint}")
        return result

    def write(self, directory: Path) -> None:
        """Write `result.json`, whole or not at all."""
        files.write_json(directory / "result.json", dataclasses.asdict(self))

    def summary(self) -> str:
        """One line for a person."""
        parts = [
            f"{name} accuracy {value:.2%}, "
            for name, value in (("test", self.test_accuracy), ("validation", self.validation_accuracy))
            if value is not None
        ]
        return "".join(parts) + f"checkpoint of step {self.checkpoint_step} of {self.steps}, {self.seconds:.0f} s"


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("test_accuracy", "test_loss", "validation_accuracy", "startup_seconds"), (*_NUMBER, _NONE)),
    **dict.fromkeys(("num_params", "checkpoint_step", "steps", "seed"), (int,)),
    **dict.fromkeys(("config", "dataset", "environment", "peak_memory_bytes"), (dict,)),
    "seconds": _NUMBER,
    "state_digest": (str,),
    "initial_weights": (dict, _NONE),
}
