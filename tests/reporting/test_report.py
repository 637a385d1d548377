import base64
import html
import io
import json
import re
import shutil
import tomllib
from functools import partial
from pathlib import Path

import browser
import numpy as np
import pytest
from helpers import ROOT, make_tiny_config, tool
from matplotlib.colors import to_hex
from PIL import Image

from configs import final, narrow, sgd, speedrun
from reproduction import claims, tables
from reproduction import report as reproduction_report
from resnet_jax import config as config_lib
from resnet_jax import models, optim, steps, training
from resnet_jax.data import datasets
from resnet_jax.errors import UserError
from resnet_jax.inference.restore import restore_run
from resnet_jax.reporting import analysis, evaluation, figures, pages, report, statistics
from resnet_jax.reporting.figures import Group
from resnet_jax.runs import stored_config, workdir
from resnet_jax.runs.exits import exit_on_user_error
from resnet_jax.setup import setup


def trained(folder, cache_dir, seed, optimizer="adamw"):
    """A complete run of some seconds."""
    config = make_tiny_config(cache_dir)
    config.seed = seed
    if optimizer == "sgd":
        config.optim, config.schedule = sgd.get_config().optim, sgd.get_config().schedule
    directory = folder / f"tiny-{optimizer}-seed{seed}"
    training.train(config, directory)
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache_dir):
    """Two seeds by AdamW and one by SGD."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        trained(folder, cache_dir, 0),
        trained(folder, cache_dir, 1),
        trained(folder, cache_dir, 0, "sgd"),
    ]


def test_a_run_that_was_not_tested_is_one_line(runs, tmp_path):
    trial = tmp_path / "confirm-0000"
    shutil.copytree(runs[0], trial)
    result = json.loads((trial / "result.json").read_text())
    (trial / "result.json").write_text(json.dumps(result | {"test_accuracy": None, "test_loss": None}))
    with pytest.raises(UserError, match=f"{trial} is a trial of a search, which was not tested"):
        analysis.summarise(trial)


@pytest.fixture(scope="module")
def summaries(runs, tmp_path_factory):
    """Their summaries, as files."""
    folder = tmp_path_factory.mktemp("summaries")
    paths = [folder / f"{run.name}.json" for run in runs]
    for run, path in zip(runs, paths, strict=True):
        tool("report", run, "--summary", path)
    return paths


@pytest.fixture(scope="module")
def page(summaries, tmp_path_factory):
    """The folder of their report."""
    directory = tmp_path_factory.mktemp("page") / "report"
    tool("report", *summaries, "--output", directory)
    return directory


@pytest.fixture(scope="module")
def own_page(summaries, tmp_path_factory):
    """The folder of the report's own page about them."""
    directory = tmp_path_factory.mktemp("own_page") / "report"
    reproduction_report.main([*map(str, summaries), "--output", str(directory)])
    return directory


# What a summary holds


def test_a_summary_is_the_result_with_what_the_run_logged_and_its_network(runs, summaries):
    summary = json.loads(summaries[0].read_text())
    result = json.loads((runs[0] / "result.json").read_text())
    assert result.items() <= summary.items()
    assert [json.dumps(row) for row in summary["metrics"]] == (runs[0] / "metrics.jsonl").read_text().splitlines()
    confusion = np.array(summary["analysis"]["confusion"])
    assert np.trace(confusion) / confusion.sum() == result["test_accuracy"]
    assert confusion.sum() == result["dataset"]["splits"]["test"]
    stages = summary["analysis"]["stages"]
    assert [stage["name"] for stage in stages] == ["stem", "stage1", "stage2", "classifier"]
    assert [stage["shape"] for stage in stages] == [[8, 8, 8], [8, 8, 8], [4, 4, 16], [10]]
    assert sum(stage["num_params"] for stage in stages) == result["num_params"]


def test_a_run_that_may_only_be_read_is_summarised_and_not_evaluated(runs, summaries, cache_dir, monkeypatch):
    def refuse(_):
        raise UserError("not writable")

    monkeypatch.setattr(workdir, "check_writable", refuse)  # root may write everywhere
    with pytest.raises(UserError, match="not writable"):
        evaluation.run(make_tiny_config(cache_dir), runs[0], "best")
    with pytest.raises(UserError, match="not writable"):
        evaluation.run_on(make_tiny_config(cache_dir), runs[0], "best", "digits")
    assert report.read_run(runs[0])[1] == json.loads(summaries[0].read_text())


def test_the_most_confident_mistakes_are_those_of_the_test_split(runs, summaries):
    found = json.loads(summaries[0].read_text())["analysis"]
    config = stored_config.from_json(json.loads((runs[0] / "config.json").read_text()))
    split = datasets.load(config.data).test
    mistakes = found["mistakes"]
    wrong = np.sum(found["confusion"]) - np.trace(found["confusion"])
    assert len(mistakes) == min(16, wrong)
    probabilities = [mistake["probability"] for mistake in mistakes]
    assert probabilities == sorted(probabilities, reverse=True)
    assert 0.1 < probabilities[-1] <= probabilities[0] <= 1
    for mistake in mistakes:
        assert mistake["label"] == split.labels[mistake["index"]] != mistake["prediction"]
        with Image.open(io.BytesIO(base64.b64decode(mistake["png"]))) as image:
            assert np.array_equal(np.asarray(image), split.images[mistake["index"]])


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_zeros_are_those_of_every_activation(tiny_config, tmp_path, block):
    """Half of the inner channels of stage 1 are shut, and all of them in stage 2."""
    tiny_config.num_epochs, tiny_config.schedule.warmup_epochs, tiny_config.model.block = 0.1, 0.05, block
    training.train(tiny_config, tmp_path)
    setup, state, _ = restore_run(tiny_config, tmp_path, "latest")
    params = state.params
    for stage, shut in (("stage1_block1", 4), ("stage2_block1", 16)):
        norm = params[stage]["norm1"]
        norm["scale"] = norm["scale"].at[:shut].set(0.0)
        norm["bias"] = norm["bias"].at[:shut].set(-1.0)
    expansion = {"basic": 1, "bottleneck": 4}[block]
    inner = {"basic": 1, "bottleneck": 2}[block]
    for name in ("norm2", "norm3")[inner - 1 : inner]:  # the block adds nothing to its shortcut
        for stage in ("stage1_block1", "stage2_block1"):
            params[stage][name] = {key: value * 0 for key, value in params[stage][name].items()}
    found = analysis.analyse(tiny_config, state.replace(params=params), setup.dataset)
    stem, first, second, _ = found["stages"]
    assert second["shape"] == [4, 4, 16 * expansion]
    relus = inner + expansion  # in units of the stage's channels
    assert first["dead"] >= 4 / (8 * relus)
    assert second["dead"] >= 16 / (16 * relus)
    assert 0 < stem["rms"] < 10
    for stage in (stem, first, second):
        assert stage["dead"] <= stage["zeros"] < 1
    if block == "basic":  # the first stage's shortcut is the identity, of what the stem's ReLU gives
        assert first["rms"] == pytest.approx(stem["rms"], rel=1e-5)
        assert first["dead"] == pytest.approx((4 + 8 * stem["dead"]) / 16)


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
def test_the_scale_of_a_stage_is_that_of_its_last_block(tiny_config, activation):
    """Activated once: another GELU would change it."""
    tiny_config.model.activation = activation
    start = setup(tiny_config)
    stage = analysis.analyse(start.config, start.state, start.dataset)["stages"][1]
    _, captured = start.state.apply_fn(
        start.state.variables,
        steps.normalize(start.dataset.test.images[:], start.config.data),
        train=False,
        capture_intermediates=lambda module, _: module.name == "stage1_block1",
        mutable=["intermediates"],
    )
    output = captured["intermediates"]["stage1_block1"]["__call__"][0]
    assert stage["rms"] == pytest.approx(np.sqrt(np.mean(np.square(output, dtype=np.float64))), rel=1e-5)


# The page


def test_the_page_shows_every_figure_and_needs_nothing_else(page, summaries):
    text = (page / "index.html").read_text()
    shown = set(re.findall(r'<figure id="(\w+)">', text))
    expected = {"accuracy", "loss", "learning_rate", "grad_norm", "scale", "zeros", "optimizers"}
    assert shown == expected | {"per_class1", "architecture1", "confusion1", "confusion2"}
    assert {path.name for path in (page / "figures").iterdir()} == {f"{n}.{s}" for n in shown for s in ("png", "svg")}
    assert not re.search(r"(src|href|srcset)=\"(?!data:)|url\(|@import|<script", text)
    for name in shown:
        with Image.open(page / "figures" / f"{name}.png") as image:
            assert len(image.convert("RGB").getcolors(2**24)) > 50  # something is drawn
    for path in summaries:
        assert path.stem.rpartition("-seed")[0] in text
    accuracies = [json.loads(path.read_text())["test_accuracy"] for path in summaries[:2]]
    assert statistics.mean_and_spread(accuracies) in text
    assert "claims" not in text.partition("</style>")[2]  # these runs are of other data than the report's


def test_a_report_is_made_of_workdirs_too_and_over_an_earlier_one(runs, page, tmp_path):
    shutil.copytree(page, tmp_path / "report")
    (tmp_path / "report" / "figures" / "stale.png").touch()
    tool("report", runs[0], "--output", tmp_path / "report")
    assert not (tmp_path / "report" / "figures" / "stale.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_the_same_summaries_give_the_same_figures(page, own_page):
    paths = list((page / "figures").glob("*.svg"))
    assert paths
    for path in paths:
        assert path.read_bytes() == (own_page / "figures" / path.name).read_bytes()


def test_names_from_the_data_are_text(summaries, tmp_path):
    summary = json.loads(summaries[0].read_text())
    summary["analysis"]["class_names"][0] = "<script>alert(1)</script> $\\frac{$ & \u03b1"
    summary["analysis"]["mistakes"][0]["label"] = 0
    (tmp_path / "hostile.json").write_text(json.dumps(summary))
    tool("report", tmp_path / "hostile.json", "--output", tmp_path / "page")
    text = (tmp_path / "page" / "index.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_run_without_validation_or_mistakes_is_drawn(summaries, tmp_path):
    summary = json.loads(summaries[0].read_text())
    summary["metrics"] = [row for row in summary["metrics"] if row["split"] != "validation"]
    summary["analysis"]["mistakes"] = []
    (tmp_path / "run.json").write_text(json.dumps(summary))
    tool("report", tmp_path / "run.json", "--output", tmp_path / "page")
    assert "mistakes" not in (tmp_path / "page" / "index.html").read_text().partition("</style>")[2]


@browser.needed
def test_chromium_shows_the_page(page):
    assert browser.images_shown(page / "index.html") >= 11


@browser.needed
def test_a_phone_shows_the_test_accuracy_of_every_run(page):
    with browser.opened((page / "index.html").as_uri(), width=390) as (shown, _):
        cells = shown.locator("#runs td[data-of='test accuracy']")
        boxes = [cell.bounding_box() for cell in cells.all()]
        assert len(boxes) == 2
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
        assert all(re.fullmatch(r"\d+\.\d\d( ± \d+\.\d\d)? %", text) for text in cells.all_inner_texts())
        hidden = "element => element.parentElement.scrollWidth > element.parentElement.clientWidth"
        assert not shown.locator("#runs").evaluate(hidden)


def captions(page):
    """Caption of each figure by its name."""
    found = re.findall(r'<figure id="(\w+)".*?<figcaption>(.*?)</figcaption>', page.read_text(), re.DOTALL)
    return {name: html.unescape(caption) for name, caption in found}


def test_only_the_reports_own_page_names_the_reports_figures(page, own_page):
    ours, of_anybody = captions(own_page / "index.html"), captions(page / "index.html")
    for name, numbers in (("optimizers", "figures 1 and 2"), ("accuracy", "figure 5"), ("architecture1", "figure 6")):
        assert ours[name] == f"{of_anybody[name]} The report's {numbers}."
    assert not re.search(r"the report|figures? \d", (page / "index.html").read_text().partition("</style>")[2], re.I)


def test_a_mistake_says_what_was_predicted_and_what_is_true(page, summaries):
    analysis = json.loads(summaries[0].read_text())["analysis"]
    text = html.unescape(re.sub(r"<[^>]+>", "", (page / "index.html").read_text()))
    for mistake in analysis["mistakes"]:
        predicted, true = (analysis["class_names"][mistake[key]] for key in ("prediction", "label"))
        assert f"predicted {predicted}, true {true}" in text


@pytest.fixture
def three_groups(summaries):
    """The groups, and a third one of another data set with the same curves as the second."""
    runs = [report.read_run(path) for path in summaries]
    other = json.loads(json.dumps(runs[2][1]))
    other["dataset"]["fingerprint"] = "other"
    other["analysis"]["class_names"] = [f"class {i}" for i in range(10)]
    return report.grouped([*runs, ("other", other)])


def test_a_group_has_the_same_colour_and_marker_in_every_figure(three_groups):
    style = {group.name: (group.colour, group.marker) for group in three_groups}
    assert len(set(style.values())) == 3
    of_groups, seen = 0, set()
    for picture in report.pictures(three_groups):
        figure = picture.draw()
        for legend in figure.legends:
            names = [text.get_text() for text in legend.get_texts()]
            shown = {n: (h.get_color(), h.get_marker()) for n, h in zip(names, legend.legend_handles, strict=True)}
            assert shown == {name: style[name] for name in shown}
            of_groups, seen = of_groups + 1, seen | shown.keys()
    assert of_groups == 9
    assert seen == style.keys()
    for i, group in enumerate(three_groups, start=1):
        (picture,) = [p for p in report.pictures(three_groups) if p.name == f"confusion{i}"]
        (image,) = picture.draw().axes[0].images
        assert to_hex(image.cmap(1.0)) == group.colour


def points(axes, group):
    """Where a group's markers are."""
    found = set()
    for line in axes.lines:
        if line.get_color() == group.colour and line.get_marker() not in ("None", "", None):
            first, step = line.get_markevery() or (0, 1)
            axes_points = zip(line.get_xdata(orig=False), line.get_ydata(orig=False), strict=True)
            found |= {(round(float(x), 9), round(float(y), 9)) for x, y in list(axes_points)[first::step]}
    return found


@pytest.mark.parametrize("draw", ["draw_learning_rate", "draw_grad_norm", "draw_scale", "draw_zeros", "draw_per_class"])
def test_a_group_with_the_same_values_as_another_stays_visible(three_groups, draw):
    first, second = three_groups[1:]
    second.runs[0]["analysis"]["class_names"] = first.runs[0]["analysis"]["class_names"]
    (axes,) = getattr(figures, draw)([first, second]).axes
    ours, theirs = points(axes, first), points(axes, second)
    assert ours
    assert theirs
    assert not ours & theirs


def test_the_accuracy_figure_shows_the_rows_of_the_runs(three_groups):
    group = three_groups[0]
    (axes,) = figures.draw_accuracy([group]).axes
    _, validation, _, *tests = [line.get_xydata() for line in axes.lines]
    expected = [[r["accuracy"] for r in run["metrics"] if r["split"] == "validation"] for run in group.runs]
    assert validation[:, 1] == pytest.approx(np.mean(expected, axis=0))
    assert [float(xy[-1, 1]) for xy in tests] == [run["test_accuracy"] for run in group.runs]


def test_a_class_without_test_images_has_no_accuracy(three_groups):
    group = three_groups[0]
    for run in group.runs:
        run["analysis"]["confusion"] = [
            [0] * 10 if i == 3 else row for i, row in enumerate(run["analysis"]["confusion"])
        ]
    (line,) = figures.draw_per_class([group]).axes[0].lines
    assert np.flatnonzero(np.isnan(line.get_xdata())).tolist() == [3]
    texts = [text.get_text() for text in figures.draw_confusion(group).axes[0].texts]
    assert [i // 10 for i, text in enumerate(texts) if text == "-"] == [3] * 10


def test_shares_are_shown_in_per_cent(three_groups):
    drawn = {p.name: p.draw().axes[0] for p in report.pictures(three_groups) if p.name[:4] in ("opti", "accu", "zero")}
    assert len(drawn) == 3
    for axes in (*drawn.values(), figures.draw_reliability({}).axes[0]):
        assert axes.yaxis.get_major_formatter()(0.725) == "72.5 %"
    assert figures.draw_per_class(three_groups[:2]).axes[0].xaxis.get_major_formatter()(0.5) == "50 %"


@pytest.mark.parametrize("draw", [figures.draw_accuracy, lambda groups: figures.draw_confusion(groups[0])])
def test_a_figure_for_a_dark_page_has_no_white_ground(three_groups, tmp_path, draw):
    figures.save(partial(draw, three_groups[:2]), tmp_path / "dark.png", "dark")
    with Image.open(tmp_path / "dark.png") as image:
        pixels = np.asarray(image.convert("RGBA"))
    assert not ((pixels[..., :3].min(axis=2) > 240) & (pixels[..., 3] > 128)).any()
    assert (pixels[..., 3] == 0).mean() > 0.5


# Its figures and claims


@pytest.mark.parametrize(
    "get_config", [final.get_config, sgd.get_config, partial(narrow.get_config, "sgd"), speedrun.get_config]
)
def test_the_formula_that_is_drawn_is_the_schedule_that_runs(get_config):
    config = get_config()
    per_epoch = 45_000 / 128
    schedule = optim.make_schedule(config, per_epoch)
    for step in range(0, int(config.num_epochs * per_epoch), 97):
        wanted = figures.learning_rate(config.to_dict(), step / per_epoch)
        assert schedule(step) == pytest.approx(wanted, rel=1e-4, abs=1e-8)


def group(name, config, accuracies):
    run = {
        "config": stored_config.to_json(config),
        "dataset": {"fingerprint": "0"},
        "environment": {"backend": "cpu"},
    }
    return Group(name, [run | {"test_accuracy": accuracy} for accuracy in accuracies])


def verdicts(groups, comparison=None):
    return [claim.verdict for claim in claims.table(groups, comparison)]


def test_accuracy_is_claimed_of_runs_of_the_reports_own_recipe_alone():
    reached, missed = group("final", final.get_config(), [0.92, 0.93]), group("final", final.get_config(), [0.90, 0.91])
    assert verdicts([reached])[0] == "holds"
    assert verdicts([missed])[0] == "does not hold: 1.30 points short"
    assert claims.table([missed], None)[0].measured == "90.50 ± 0.71 %"
    for field in ({"num_epochs": 10.0}, {"augment.policy": "cifar10"}, {"data.image_size": 16}):
        other = group("other", config_lib.replaced(final.get_config(), field), [0.95, 0.95])
        assert verdicts([other])[0] == "not measured"
    both = claims.table([missed._replace(runs=missed.runs[:1]), reached], None)[:2]
    assert [claim.basis.rpartition(", ")[2] for claim in both] == ["2 seeds", "1 seed"]
    assert [claim.verdict for claim in both] == ["holds", "does not hold: 1.80 points short"]
    authors = config_lib.replaced(final.get_config("full"), {"augment.policy": "cifar10"})
    assert verdicts([group("authors", authors, [0.95])])[:2] == ["not measured", "holds"]


@pytest.mark.parametrize(
    ("adamw", "sgd_accuracies", "verdict"),
    [
        ([0.80, 0.81, 0.82], [0.70, 0.71, 0.72], "holds in this protocol"),
        ([0.70, 0.71, 0.72], [0.80, 0.81, 0.82], "does not hold: SGD is better in this protocol"),
        ([0.70, 0.75, 0.80], [0.71, 0.74, 0.79], "undecided: the difference is not significant"),
        ([0.80], [0.70], "undecided: needs at least two seeds"),
    ],
)
def test_optimizers_are_compared_where_all_else_is_alike(adamw, sgd_accuracies, verdict):
    groups = [group("adamw", final.get_config(), adamw), group("sgd", sgd.get_config(), sgd_accuracies)]
    assert verdicts(groups)[4] == verdict
    gpu = [run | {"environment": {"backend": "gpu"}} for run in groups[1].runs]
    assert verdicts([groups[0], groups[1]._replace(runs=gpu)])[4] == "not measured"
    averaged = config_lib.replaced(sgd.get_config(), {"optim.ema_decay": 0.9})
    assert verdicts([groups[0], group("sgd", averaged, sgd_accuracies)])[4] == "not measured"
    elsewhere = config_lib.replaced(sgd.get_config(), {"data.name": "npz:cifar10.npz"})  # the same data
    assert verdicts([groups[0], group("sgd", elsewhere, sgd_accuracies)])[4] == verdict
    groups[1] = group("sgd", config_lib.replaced(sgd.get_config(), {"batch_size": 64}), sgd_accuracies)
    assert verdicts(groups)[4] == "not measured"


def test_a_difference_has_welchs_interval():
    """Of 3 values each: variances 1e-4 and 4e-4, so a standard error of sqrt(5e-4 / 3) with 2.94 degrees of freedom."""
    difference, low, high = statistics.compare([0.70, 0.71, 0.72], [0.78, 0.80, 0.82])
    assert difference == pytest.approx(0.09)
    assert (low + high) / 2 == pytest.approx(0.09)
    assert (high - low) / 2 == pytest.approx(3.2204 * np.sqrt(5e-4 / 3), rel=1e-3)
    assert statistics.compare([0.7], [0.8, 0.9]) is None
    assert statistics.compare([0.7, 0.7], [0.8, 0.8]) is None  # they say nothing about the noise


def comparison(ours, theirs):
    """What `reproduction.reproduce resnet18` writes, of (parameters, seconds)."""
    figures_of = [{"num_params": n, "seconds_per_epoch": s, "train_flops_per_image": 1e9} for n, s in (ours, theirs)]
    less = {name: 1 - figures_of[0][name] / figures_of[1][name] for name in figures_of[0]}
    case = {"dtype": "float32", "batch_size": 128}
    environment = {"backend": "cpu", "cpu_count": 2, "devices": ["cpu"]}
    return {
        "final": figures_of[0],
        "resnet18": figures_of[1],
        "final_has_less_by": less | {"seconds_per_epoch_by_round": [less["seconds_per_epoch"] - 0.02, 0.25]},
        "benchmarks": {"final": {"cases": [case], "environment": environment}},
    }


def test_size_and_speed_are_claimed_beside_resnet18():
    assert verdicts([], comparison((4_918_602, 78), (11_173_962, 100)))[-3:] == [
        "holds",
        "does not hold: 56 % less",
        "holds",
    ]
    (*_, speed) = claims.table([], comparison((4_918_602, 78), (11_173_962, 100)))
    assert (
        speed.measured
        == "78 s against 100 s, 22 % less (by round 25 % less to 20 % less); 1.00 against 1.00 GFLOP per image"
    )
    assert speed.basis == "2 CPU cores, float32, batch 128, measured alternately in 2 rounds"
    assert verdicts([], comparison((7_400_000, 120), (10_000_000, 100)))[-3:] == [
        "does not hold",
        "holds",
        "does not hold: 20 % more",
    ]
    assert verdicts([])[-3:] == ["not measured"] * 3


def test_without_runs_the_page_is_about_those_in_results(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(report, "build", lambda *arguments: built.append(arguments))
    reproduction_report.main(["--output", str(tmp_path / "page")])
    ((runs, _, claims_of, _),) = built
    assert [name for name, _ in runs] == [path.stem for path in tables.run_files()]
    assert claims_of(report.grouped(runs)) == claims.table(
        tables.groups(), tables.read_result(tables.comparison_file().name)
    )


def test_runs_of_one_config_are_one_group(summaries):
    read = [report.read_run(path) for path in summaries]
    groups = report.grouped(read[::-1])
    assert [(g.name, [run["seed"] for run in g.runs]) for g in groups] == [("tiny-sgd", [0]), ("tiny-adamw", [0, 1])]
    assert [g.name for g in report.grouped([("a", read[0][1]), ("a", read[2][1])])] == ["a (1)", "a (2)"]
    on_gpu = read[0][1] | {"environment": read[0][1]["environment"] | {"backend": "gpu"}}
    assert [len(g.runs) for g in report.grouped([read[0], ("on-gpu", on_gpu)])] == [1, 1]  # other arithmetic


# Mistakes

SMALL = {"config": {}, "dataset": {}, "environment": {}, "num_params": 1, "test_accuracy": 1, "test_loss": 1}
MISTAKES = {
    "no run": (["nowhere", "--output", "page"], "nowhere"),
    "a run under way": (["unfinished", "--output", "page"], "is not a complete run"),
    "a file of something else": (["other.json", "--output", "page"], "lacks metrics, analysis"),
    "a file that only looks like one": (["fake.json", "--output", "page"], "config.seed is missing"),
    "no JSON": (["text.json", "--output", "page"], "text.json cannot be used"),
    "the same run twice": (["good.json", "twin.json", "--output", "page"], "have the same config and seed"),
    "a folder of something else": (["good.json", "--output", "unfinished"], "holds files that are not a report"),
    "a file as folder": (["good.json", "--output", "text.json"], "holds files that are not a report"),
    "a folder in a file": (["good.json", "--output", "text.json/page"], "cannot be written"),
    "a summary of two": (["good.json", "twin.json", "--summary", "x.json"], "--summary takes one RUN"),
    "a file that is no summary": (
        ["good.json", "--summary", "other.json"],
        "--summary overwrites only the summary of a run",
    ),
    "no fingerprint": (["fingerprint.json", "--output", "page"], "is not the summary of a run"),
    "no count": (["count.json", "--output", "page"], "is not the summary of a run"),
    "a share that is no number": (["share.json", "--output", "page"], "is not the summary of a run"),
    "a summary nowhere": (["good.json", "--summary", "nowhere/x.json"], "cannot be written"),
    "no comparison": (["good.json", "--resnet18", "nowhere", "--output", "page"], "reproduction.reproduce resnet18"),
    "another comparison": (
        ["good.json", "--resnet18", "good.json", "--output", "page"],
        "is not a comparison with ResNet-18",
    ),
    "a report with a file of the user's": (
        ["good.json", "--output", "kept"],
        "not a report (mine.txt): give a new folder",
    ),
    "a page that is no report": (["good.json", "--output", "site"], "holds files that are not a report"),
    "no rate": (["rate.json", "--output", "page"], "is not the summary of a run"),
    "no stages": (["stages.json", "--output", "page"], "the network has no stages"),
    "no devices": (["devices.json", "--output", "page"], "is not the summary of a run"),
    "a label of no class": (["label.json", "--output", "page"], "is not the summary of a run"),
    "an empty list of devices": (["empty.json", "--output", "page"], "is not the summary of a run"),
    "broken rows": (["rows.json", "--output", "page"], "is not the summary of a run"),
    "a broken picture": (["picture.json", "--output", "page"], "is not the summary of a run"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(summaries, tmp_path, monkeypatch, capsys, mistake):
    monkeypatch.chdir(tmp_path)
    good = json.loads(summaries[0].read_text())
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "metrics.jsonl").touch()
    for folder in ("kept", "site"):
        (tmp_path / folder / "figures").mkdir(parents=True)
    (tmp_path / "kept" / "index.html").write_text(pages._GENERATOR)
    (tmp_path / "kept" / "mine.txt").touch()
    (tmp_path / "site" / "index.html").write_text("<html>")
    picture, label = (
        good["analysis"] | {"mistakes": [good["analysis"]["mistakes"][0] | change]}
        for change in ({"png": "!"}, {"label": 99})
    )
    files = {
        "good": good,
        "twin": good,
        "other": SMALL | {"seconds": 1, "steps": 1},
        "fake": SMALL | {"seconds": 1, "steps": 1, "metrics": [], "analysis": {}},
        "rows": good | {"metrics": [{"step": 1}]},
        "picture": good | {"analysis": picture},
        "label": good | {"analysis": label},
        "empty": good | {"environment": good["environment"] | {"backend": "gpu", "devices": []}},
        "rate": good | {"metrics": [good["metrics"][0] | {"learning_rate": None}]},
        "stages": good | {"analysis": good["analysis"] | {"stages": []}},
        "devices": good | {"environment": {}},
        "fingerprint": good | {"dataset": {}},
        "count": good | {"analysis": good["analysis"] | {"confusion": [["few"] * 10] * 10}},
        "share": good | {"analysis": good["analysis"] | {"stages": [good["analysis"]["stages"][0] | {"dead": "many"}]}},
    }
    for name, content in files.items():
        Path(f"{name}.json").write_text(json.dumps(content))
    Path("text.json").write_text("no JSON")
    before = sorted(tmp_path.rglob("*"))
    arguments, words = MISTAKES[mistake]
    main = reproduction_report.main if "--resnet18" in arguments else report.main
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert sorted(tmp_path.rglob("*")) == before


def test_the_templates_come_with_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["resnet_jax"]
    templates = [path for path in (ROOT / "resnet_jax").rglob("*") if path.suffix in (".html", ".md")]
    assert templates
    for path in templates:
        assert any(path.relative_to(ROOT / "resnet_jax").match(pattern) for pattern in patterns)
