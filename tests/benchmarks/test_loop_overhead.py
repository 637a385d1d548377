import json

import pytest
from helpers import make_tiny_config

from benchmarks import loop_overhead
from resnet_jax.disk import files
from resnet_jax.runs import stored_config


def test_a_loop_takes_at_least_the_time_of_its_steps_and_evaluations(tmp_path, cache_dir):
    config = make_tiny_config(cache_dir)
    config.eval_every_epochs = 1
    files.write_json(tmp_path / "config.json", stored_config.to_json(config))
    output = tmp_path / "overhead.json"
    loop_overhead.main(
        [
            *("--config", str(tmp_path / "config.json"), "--images-per-second=2000", "--evaluated-per-second=1440"),
            *("--repeats=2", "--output", str(output)),
        ]
    )
    (case,) = json.loads(output.read_text())["cases"]
    figures = case["figures"]
    steps = 41 * config.batch_size / 2000
    assert figures["steps alone"]["median"] == pytest.approx(steps)
    evaluations = 0.1 * len([1, 2])  # of 144 images each
    assert figures["evaluations alone"]["median"] == pytest.approx(evaluations)
    for took, overhead in zip(figures["loop"]["repeats"], figures["overhead"]["repeats"], strict=True):
        assert took >= steps + evaluations
        assert overhead == pytest.approx(100 * (took / steps - 1))
