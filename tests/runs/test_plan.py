"""The plan alone: no JAX, no data."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from resnet_jax.runs.plan import Call, Plan, total_steps

PLAN = Plan(
    total_steps=41,
    batch_size=64,
    num_examples=1294,
    eval_every_epochs=1,
    checkpoint_every_steps=0,
    log_every_steps=10,
)


def plan(**changes):
    return Plan(**{**vars(PLAN), **changes})


def steps_where(condition):
    return [step for step in range(1, 42) if condition(step)]


def test_too_few_images_or_steps_are_warned_of_with_the_numbers():
    assert plan().warnings() == plan(batch_size=1294, total_steps=10).warnings() == []
    (few,) = plan(batch_size=64, num_examples=63).warnings()
    assert "a batch holds 64 images, and there are only 63" in few
    (short,) = plan(total_steps=9).warnings()
    assert "takes only 9 steps of 64 images" in short


@pytest.mark.parametrize(
    ("num_epochs", "batch_size", "num_examples", "steps"),
    [
        (11.0, 264, 45_000, 1875),  # 45,000 / 264 * 11 is 1875.0000000000002 in floats
        (1.1, 100, 1000, 11),  # and so is 1.1 * 10 more than 11
        (2.0, 64, 1294, 41),
        (1e-9, 64, 1294, 1),
        (1e9, 1, 3, 3 * 10**9),
        (1e300, 1, 3, 3 * 10**300 - 1),  # whose epochs are 1e300 as well, in floats
    ],
)
def test_steps_are_counted_exactly(num_epochs, batch_size, num_examples, steps):
    assert total_steps(ConfigDict({"num_epochs": num_epochs, "batch_size": batch_size}), num_examples) == steps


@given(
    steps=st.integers(1, 10**7),
    batch_size=st.integers(1, 4096),
    num_examples=st.integers(1, 10**6),
)
def test_epochs_that_a_program_divided_take_the_steps_it_divided(steps, batch_size, num_examples):
    config = ConfigDict({"num_epochs": steps * batch_size / num_examples, "batch_size": batch_size})
    assert total_steps(config, num_examples) == steps


def test_it_needs_no_jax():
    code = "import sys, resnet_jax.runs.plan; assert not {'jax', 'numpy', 'tensorflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("total_steps", "eval_every_epochs", "batch_size", "num_examples", "evaluations"),
    [
        (41, 1, 64, 1294, [21, 41]),  # 21 * 64 = 1344 is the first multiple past 1294
        (30, 1, 10, 100, [10, 20, 30]),
        (30, 2, 10, 100, [20, 30]),
        (25, 1, 10, 1000, [25]),
        (25, 1, 10, 100, [10, 20, 25]),
        (2, 1, 100, 50, [1, 2]),
    ],
)
def test_it_evaluates_as_epochs_end_and_after_the_last_step(
    total_steps, eval_every_epochs, batch_size, num_examples, evaluations
):
    changed = plan(
        total_steps=total_steps,
        eval_every_epochs=eval_every_epochs,
        batch_size=batch_size,
        num_examples=num_examples,
    )
    assert [step for step in range(1, total_steps + 1) if changed.evaluates_after(step)] == evaluations


def test_it_saves_where_it_evaluates_and_every_so_many_steps():
    assert steps_where(PLAN.saves_after) == [21, 41]
    assert steps_where(plan(checkpoint_every_steps=15).saves_after) == [15, 21, 30, 41]


def test_it_logs_every_so_many_steps_and_after_the_last():
    assert steps_where(PLAN.logs_after) == [10, 20, 30, 40, 41]


def test_a_call_measures_the_speed_only_if_a_full_row_ends_in_it():
    assert [PLAN.measures_speed(Call(first, first + 3)) for first in (0, 6, 7, 10, 38)] == [
        False,
        False,
        True,
        False,
        True,
    ]
    assert not PLAN.measures_speed(Call(40, 41))  # the last row, of a single step


@pytest.mark.parametrize("steps_per_call", [1, 2, 5, 50])
@pytest.mark.parametrize("first_step", [0, 7, 21, 40])
def test_calls_cover_every_step_once_and_never_go_past_a_save(first_step, steps_per_call):
    uneven = plan(checkpoint_every_steps=9)
    calls = list(uneven.calls(first_step, steps_per_call))
    assert [step for call in calls for step in range(call.start + 1, call.end + 1)] == list(range(first_step + 1, 42))
    for call in calls:
        assert call.count in (1, uneven.steps_per_call(steps_per_call))
        assert call.count <= steps_per_call
        assert not any(uneven.saves_after(step) for step in range(call.start + 1, call.end))


@pytest.mark.parametrize(
    ("steps_between_saves", "most", "steps_per_call"),
    [
        (351, 50, 50),  # configs/final.py: seven calls and a step
        (97, 50, 48),  # configs/best.py: two calls and a step, and not one call and 47 steps
        (98, 50, 49),
        (351, 500, 351),
        (11, 50, 11),
        (0, 50, 41),  # a save after every step, of a batch larger than the data: such calls are single steps
    ],
)
def test_a_call_takes_the_steps_with_which_there_are_fewest_calls(steps_between_saves, most, steps_per_call):
    total = max(steps_between_saves, 41)
    between = plan(total_steps=total, num_examples=steps_between_saves * 64 + 1)
    assert between.steps_per_call(most) == steps_per_call
    assert plan(total_steps=total, num_examples=10**6, checkpoint_every_steps=7).steps_per_call(most) == 7
    fewest = len(list(between.calls(0, most)))
    assert all(fewest <= len(list(between.calls(0, count))) for count in range(1, most + 1))


def test_after_a_save_the_calls_are_those_of_the_run_that_did_not_stop():
    calls = list(PLAN.calls(0, 5))
    resumed = list(PLAN.calls(21, 5))
    assert resumed == [call for call in calls if call.start >= 21]


def test_a_run_that_is_complete_has_no_calls():
    assert list(PLAN.calls(41, 5)) == []
