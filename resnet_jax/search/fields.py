"""The additional fields of a search's config."""

from collections.abc import Callable

from resnet_jax import config


def _lists(low: int) -> config.Field:
    integers = config.integers(low)
    return config.Field(
        tuple,
        lambda v: len(v) > 0 and all(type(x) is tuple and integers.accepts(x) for x in v),
        f"a tuple of one or more tuples, each of whole numbers from {low} to {2**16}",
    )


def _range(words: str, accepts: Callable[[float], bool]) -> config.Field:
    return config.Field(
        tuple,
        lambda v: (
            len(v) == 2
            and all(type(x) in (int, float) and config.is_finite(x) and accepts(x) for x in v)
            and v[0] <= v[1]
        ),
        f"a tuple of a lowest and a highest number {words}",
    )


SEARCH_FIELDS: dict[str, config.Field] = {
    "search.objective": config.choice("accuracy", "accuracy_params", "accuracy_seconds"),
    "search.max_gflops": config.NOT_NEGATIVE,
    "search.channel_lists": _lists(1),
    "search.block_lists": _lists(0),
    "search.reduction_factor": config.integer(2, 100),
    "search.refine_trials": config.integer(1, 10_000),
    "search.width_range": config.number("a number from 1 to 100", lambda v: 1 <= v <= 100),
    "search.width_step": config.integer(1, 1024),
    "search.block_range": config.integer(0, 100),
    "search.learning_rate": _range("> 0", lambda v: v > 0),
    "search.weight_decay": _range("> 0", lambda v: v > 0),
    "search.warmup_share": _range(">= 0 and < 1", lambda v: 0 <= v < 1),
    "search.confirm_top": config.integer(1, 100),
    "search.confirm_seeds": config.integer(2, 100),
}
