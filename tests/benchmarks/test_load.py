import json

from benchmarks import load


def test_each_process_is_measured_and_its_prediction_works(tmp_path):
    load.main(["final-cifar10", "--repeats=1", f"--output={tmp_path / 'load.json'}"])
    written = json.loads((tmp_path / "load.json").read_text())
    (case,) = written["cases"]
    seconds = {name: figure["median"] for name, figure in case["figures"].items()}
    assert set(seconds) == {"import", "load cold", "load warm"}
    assert 0 < seconds["import"] < seconds["load cold"]
    assert written["environment"]["versions"]["jax"]
