"""README.md and docs/*.md: their figures, tables, links, paths and words; the words of the code. `test_documented_commands.py` runs their commands."""

import io
import re
import tokenize

import pytest
from helpers import DOCUMENTS, ROOT
from PIL import Image

from reproduction import tables
from resnet_jax.config import ALL_FIELDS
from resnet_jax.search.fields import SEARCH_FIELDS

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)

SOURCES = [
    *sorted(path for folder in ("resnet_jax", "benchmarks", "reproduction") for path in (ROOT / folder).rglob("*.py")),
    *sorted(set((ROOT / "configs").glob("*.py")) - {ROOT / "configs" / "found_cpu.py"}),  # by a search, with its digest
    ROOT / "launch.py",
]

# The left column of the project's style table, and similar phrases.
CLIPPED = (
    r"\bmend",
    r"start the same command again",
    r"\bare of \w+:",
    r"\bis no (?:file|folder|number|run)\b",
    r"what is said of",
    r"\bare meant\b",
    r"tells? no spread",
    r"\bto be had\b",
    r"ha(?:s|ve) not\b(?! been)",
    r"of which nothing",
    r"what is not (?:here|there)",
    r"\bwhere there is one\b",
    r"\bgoes? on\b",
)


def without_code(text):
    """A document without fenced and indented code, generated tables and HTML comments."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^<!-- (?!end).*?^<!-- end -->$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)


def prose(text):
    """The paragraphs and list items of a document, each on one line, without inline code."""
    text = re.sub(r"`[^`]*`", "CODE", without_code(text))
    text = re.sub(r"^(?=[-|#] ?|\d+\. )", "\n", text, flags=re.MULTILINE)
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def spans(text):
    """The inline code of a document."""
    return re.findall(r"`([^`\n]+)`", without_code(text))


def anchors(text):
    """What a link into a document may name: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text().split()) <= 550


def test_the_core_reads_in_an_hour():
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "resnet_jax").glob("*.py")}
    assert sum(lines.values()) <= 1650, lines


def test_the_readme_links_to_every_document():
    readme = (ROOT / "README.md").read_text()
    assert all(f"({path.relative_to(ROOT)})" in readme for path in DOCUMENTS[1:])


@pytest.mark.parametrize("path", DOCUMENTS[1:], ids=lambda path: path.name)
def test_a_document_first_says_who_needs_it(path):
    _, first, *_ = prose(path.read_text())
    assert first.startswith("Read this ")


@every_document
def test_the_english_is_plain(path):
    text = without_code(path.read_text())
    assert [line for line in text.splitlines() if any(re.search(words, line, re.IGNORECASE) for words in CLIPPED)] == []


def test_the_english_of_the_code_is_plain():
    clipped = re.compile("|".join(CLIPPED), re.IGNORECASE)
    assert len(SOURCES) > 80
    found = []
    for path in SOURCES:
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            is_words = token.type in (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", None))
            if is_words and (match := clipped.search(" ".join(token.string.split()))):
                found.append(f"{path.relative_to(ROOT)}:{token.start[0]}: {match[0]}")
    assert found == []


@every_document
def test_a_paragraph_has_at_most_four_sentences(path):
    paragraphs = prose(path.read_text())
    assert len(paragraphs) > 5
    assert [part for part in paragraphs if len(re.findall(r"[.!?]\)?(?= |$)", part)) > 4] == []


def test_a_cell_of_the_readme_holds_a_phrase():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    assert rows
    assert all(len(cell) <= 60 for row in rows for cell in row.split("|"))


@every_document
def test_every_link_leads_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text()))
    for link in links:
        target, _, anchor = link.partition("#")
        if target.startswith(("http:", "https:")):
            continue
        file = path.parent / target if target else path
        assert file.exists(), link
        assert not anchor or anchor in anchors(file.read_text()), link


@every_document
def test_every_path_and_field_that_is_named_exists(path):
    roots = (ROOT, ROOT / "resnet_jax", ROOT / "configs")
    written = {"configs/found.py"}  # by a search
    fields = ALL_FIELDS | SEARCH_FIELDS
    for span in spans(path.read_text()):
        if re.fullmatch(
            r"(?:resnet_jax|configs|results|docs|examples|benchmarks|reproduction|tests)/[\w/.-]*|[\w/]+\.py", span
        ):
            assert span in written or any((root / span).exists() for root in roots), span
        if (name := re.match(r"(?:--)?config\.((?!json|py)[\w.]+)", span)) and name[1] not in fields:
            assert any(field.startswith(f"{name[1]}.") for field in fields), span


def test_the_number_of_parameters_is_that_of_the_run():
    count = tables.read_result("quickstart-cpu-0.json")["num_params"]
    assert f"{count:,} parameters" in (ROOT / "docs" / "usage.md").read_text()


@pytest.mark.parametrize("path", tables.DOCUMENTS, ids=lambda path: path.stem)
def test_the_tables_are_those_that_the_results_make(path):
    document = path.read_text()
    assert tables.refreshed(document) == document, "run python -m reproduction.tables"
    assert document.count("<!-- end -->") == document.count("<!-- ") / 2 > 0


def test_every_benchmark_and_every_comparison_has_its_table():
    shown = set(re.findall(r"<!-- results/([\w-]+\.json) -->", "".join(path.read_text() for path in tables.DOCUMENTS)))
    groups = {path.name for path in tables.run_files()} | {tables.comparison_file().name}  # in the table of claims
    evaluated = {path.name for path in (ROOT / "results").glob("eval-*.json")}  # in that of evaluations
    finetuned = {path.name for path in (ROOT / "results").glob("finetune-*.json")}  # in that of fine-tuning
    quickstart = {path.name for path in (ROOT / "results").glob("quickstart-*.json")}  # in that of make run
    ladder = {"ladder-cpu.json"}  # in the table of that name
    assert shown | groups | evaluated | finetuned | quickstart | ladder == {
        path.name for path in (ROOT / "results").glob("*.json")
    }


@pytest.mark.parametrize("name", tables.FIGURES)
def test_a_figure_is_drawn_from_the_results(name):
    assert any(f"results/{name})" in path.read_text() for path in DOCUMENTS)
    with Image.open(ROOT / "results" / name) as image:
        assert image.text["Source"] == tables.figure_digest(name), "run python -m reproduction.tables"


def test_the_figure_of_accuracy_is_out_of_date_once_a_result_changes(monkeypatch):
    before, groups = tables.figure_digest("accuracy.png"), tables.groups()
    drawn = next(group for group in groups if group.name == "final-h200")
    next(row for row in drawn.runs[0]["metrics"] if row["split"] == "validation")["accuracy"] += 1e-6
    monkeypatch.setattr(tables, "groups", lambda: groups)
    assert tables.figure_digest("accuracy.png") != before


def test_the_figure_of_arithmetic_shows_every_training_of_the_table():
    (axes,) = tables.draw_budget().axes
    shown = {text.get_text(): text.xy for text in axes.texts}
    rows = [line.strip("| ").split(" | ") for line in tables.budget_table().splitlines()[2:]]
    assert len(rows) == len(shown) == 7
    for name, accuracy, _, pflop, _ in rows:
        x, y = shown[name.replace("`", "")]
        assert x == pytest.approx(float(pflop), rel=0.02)
        assert f"{100 * y:.4g}".startswith(accuracy.split(" ")[0].rstrip("0").rstrip("."))
        assert axes.get_xlim()[0] < x < axes.get_xlim()[1]
        assert axes.get_ylim()[0] < y < axes.get_ylim()[1]


def test_every_promise_of_reliability_names_tests_that_are_there_and_every_slow_test_is_named():
    tests = {
        path.name: set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
        for path in (ROOT / "tests").rglob("test_*.py")
    }
    rows = [line for line in (ROOT / "docs" / "reliability.md").read_text().splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith("| promise")]
    assert len(promises) > 20
    for row in promises:
        _, cell, command = row.strip("| ").split(" | ")
        named = set(re.findall(r"`(test_\w+)`", cell))
        assert named, row
        assert named <= set.union(*tests.values()), row
        assert ("make test-slow" in command) == (named <= tests["test_reliability.py"]), row
    assert tests["test_reliability.py"] <= set(re.findall(r"`(test_\w+)`", "".join(promises)))
