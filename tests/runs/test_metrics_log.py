"""Which validation is the best: the choice of the checkpoint that a run tests and ships."""

import json
import math
import random

import pytest

from resnet_jax.runs.metrics_log import Validation, best_step, validations

CHOICES = {
    "nothing": ({}, None),
    "the highest accuracy": ({1: (0.5, 1.0), 2: (0.9, 0.5), 3: (0.8, 0.1)}, 2),
    "a near tie goes to the lower loss": ({1: (0.90, 0.3), 2: (0.91, 0.4)}, 1),
    "a later near tie too": ({1: (0.91, 0.4), 2: (0.90, 0.3)}, 2),
    "equal ones go to the later step": ({1: (0.9, 0.3), 2: (0.9, 0.3)}, 2),
    "a lower loss does not save a clearly lower accuracy": ({1: (0.91, 0.4), 2: (0.88, 0.1)}, 1),
    "the best so far is left behind": ({1: (0.90, 0.1), 2: (0.91, 0.2), 3: (0.93, 0.9)}, 3),
    "any loss is better than none": ({1: (0.9, math.nan), 2: (0.9, 0.3), 3: (0.9, math.nan)}, 2),
    "many small steps down do not add up": ({1: (0.93, 0.5), 2: (0.92, 0.4), 3: (0.91, 0.3), 4: (0.90, 0.2)}, 2),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_best_validation(case):
    rows, expected = CHOICES[case]
    assert best_step({step: Validation(*row, standard_error=0.015) for step, row in rows.items()}) == expected


def test_without_a_standard_error_the_highest_accuracy_decides():
    assert best_step({1: Validation(0.91, 0.4), 2: Validation(0.9099, 0.1)}) == 1


def test_the_best_of_more_steps_is_the_best_so_far_or_the_newest():
    """Only the best checkpoint is kept, so no other may be chosen later."""
    rng = random.Random(0)
    for _ in range(300):
        rows = [(rng.uniform(0.8, 1.0), rng.uniform(0.1, 1.0), rng.uniform(0.0, 0.05)) for _ in range(20)]
        validated = {step: Validation(*row) for step, row in enumerate(rows, start=1)}
        so_far = [best_step({s: v for s, v in validated.items() if s <= step}) for step in range(21)]
        for step in range(1, 21):
            assert so_far[step] in (so_far[step - 1], step)


@pytest.mark.parametrize("error", [None, "x", []])
def test_a_validation_whose_standard_error_is_no_number_is_passed_over(tmp_path, error):
    row = {"step": 1, "split": "validation", "accuracy": 0.5, "loss": 1.0}
    rows = [row, row | {"step": 2, "accuracy": 0.9, "standard_error": error}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(validations(tmp_path)) == [1]
