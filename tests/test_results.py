import json

import pytest
from matplotlib.figure import Figure

from benchmarks import readme, record


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Folders where nothing is kept yet."""
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record, "FIGURES", tmp_path / "figures")
    return tmp_path


def test_the_tables_of_both_readmes_are_what_the_results_say():
    for path in readme.FILES:
        assert readme.filled(path.read_text()) == path.read_text(), f"run python benchmarks/readme.py: {path}"


@pytest.mark.parametrize(("name", "question"), readme.FIGURES.items())
def test_a_figure_shows_the_rows_that_are_kept(name, question):
    assert record.shown(name) == record.digest(question), "run python benchmarks/readme.py"


def test_every_figure_is_small_shown_and_drawn_from_rows():
    text = "".join(path.read_text() for path in readme.FILES)
    assert {path.stem for path in record.FIGURES.iterdir()} == {*readme.FIGURES, "paper"}  # that one is of logs
    for path in record.FIGURES.iterdir():
        assert f"figures/{path.name})" in text
        assert path.stat().st_size < 100_000


def test_a_table_is_put_between_its_marks_with_a_line_on_its_rows(results, monkeypatch):
    monkeypatch.setattr(record, "table", lambda *_: "TABLE")
    record.keep("examples", dict(example="none of them", machine="this one"))
    line = "1 rows of results/examples.jsonl, each with its command and seed. Machine: this one."
    text = "before\n<!-- examples.table -->\n\nold\n\n<!-- end -->\nafter"
    assert readme.filled(text) == f"before\n<!-- examples.table -->\n\nTABLE\n\n{line}\n\n<!-- end -->\nafter"


@pytest.mark.parametrize("end", ["", "<!-- END -->", "<!-- examples.table -->\n"])
def test_a_mark_without_an_end_is_an_error(end):
    with pytest.raises(ValueError, match="end"):
        readme.filled(f"<!-- examples.table -->\n\nold\n\n{end}")


def test_a_figure_is_current_until_another_row_is_kept(results):
    record.keep("question", dict(row=1))
    assert record.shown("figure") is None
    record.save(Figure(), "figure", "question", dpi=10)
    assert record.shown("figure") == record.digest("question")
    record.keep("question", dict(row=2))
    assert record.shown("figure") != record.digest("question")


def test_a_log_is_read_up_to_its_last_whole_line(tmp_path):
    assert record.log(tmp_path) == []
    events = [dict(event="start"), dict(event="round", round=1)]
    text = "".join(json.dumps(event) + "\n" for event in events)
    for rest in ("", '{"event": "rou'):
        tmp_path.joinpath("log.jsonl").write_text(text + rest)
        assert record.log(tmp_path) == events
