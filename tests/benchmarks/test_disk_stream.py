import json

import pytest

from benchmarks import disk_stream


def test_both_streams_and_their_ratios_are_measured(tmp_path):
    output = tmp_path / "on-disk.json"
    disk_stream.main(["--images=130", "--repeats=2", "--output", str(output)])
    result = json.loads(output.read_text())
    figures = result["cases"][0]["figures"]
    ratios = figures["resnet_jax / tf.data"]["repeats"]
    for ratio, ours, theirs in zip(
        ratios, figures["resnet_jax"]["repeats"], figures["tf.data"]["repeats"], strict=True
    ):
        assert ratio == pytest.approx(ours / theirs)
    assert result["set"]["decoded_bytes"] == 130 * 224 * 224 * 3 > result["set"]["jpeg_bytes"] > 0
    assert result["config"]["augment"]["resized_crop_area"] == 0.08
