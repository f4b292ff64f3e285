"""Rows, tables and figures of benchmarks/: the documents must show what benchmarks/results/ contains."""

import json
import sys

import pytest
from matplotlib.figure import Figure

from benchmarks import results, update_tables


@pytest.fixture
def empty(monkeypatch, tmp_path):
    """Empty directories of results and figures."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results, "FIGURES", tmp_path / "figures")


@pytest.mark.parametrize("path", update_tables.pages(), ids=lambda path: path.relative_to(update_tables.ROOT))
def test_tables_match_the_rows(path):
    text = path.read_text()
    assert update_tables.fill(text) == text, "run python benchmarks/update_tables.py"


@pytest.mark.parametrize(("file", "name"), update_tables.FIGURES.items())
def test_figures_match_the_rows(file, name):
    assert results.figure_digest(file) == results.digest(name), "run python benchmarks/update_tables.py"


def test_figures_are_small_linked_and_drawn_from_rows():
    text = "".join(path.read_text() for path in update_tables.pages())
    drawn_from_logs = {"reproduce_paper"}
    assert {path.stem for path in results.FIGURES.iterdir()} == {*update_tables.FIGURES, *drawn_from_logs}
    for path in results.FIGURES.iterdir():
        assert f"figures/{path.name})" in text
        assert path.stat().st_size < 100_000


@pytest.mark.parametrize("name", results.OLD_KEYS)
def test_names_of_old_rows_are_translated(name):
    def keys(row):
        return {*row, *(key for value in row.values() if isinstance(value, dict) for key in keys(value))}

    rows = results.read_rows(name)
    found = set().union(*map(keys, rows))
    assert not found & set(results.OLD_KEYS[name])
    assert all(isinstance(row["command"], str) and row["machine"] for row in rows)


def test_rows_are_appended_and_change_the_digest_of_a_figure(empty):
    results.append_row("name", dict(steps=1))
    assert results.figure_digest("figure") is None
    results.save_figure(Figure(), "figure", "name", dpi=10)
    assert results.figure_digest("figure") == results.digest("name")
    results.append_row("name", dict(steps=2))
    assert results.figure_digest("figure") != results.digest("name")
    assert results.read_rows("name") == [dict(steps=1), dict(steps=2)]


def test_a_table_is_filled_between_its_markers(empty, monkeypatch):
    monkeypatch.setattr(results, "markdown_table", lambda *_: "TABLE")
    results.append_row("readme_results", dict(command="", machine="a machine"))
    text = "before\n<!-- readme_results.table -->\n\nold\n\n<!-- end -->\nafter"
    filled = update_tables.fill(text)
    assert "TABLE" in filled and "a machine" in filled and "old" not in filled
    assert filled.startswith("before\n<!-- readme_results.table -->\n") and filled.endswith("<!-- end -->\nafter")


@pytest.mark.parametrize("end", ["", "<!-- END -->", "<!-- readme_results.table -->\n"])
def test_a_marker_without_an_end_raises(end):
    with pytest.raises(ValueError, match="end"):
        update_tables.fill(f"<!-- readme_results.table -->\n\nold\n\n{end}")


def test_a_log_is_read_up_to_its_last_complete_line(tmp_path):
    assert results.read_log(tmp_path) == []
    events = [dict(event="start", log_version=2), dict(event="round", round=1)]
    text = "".join(json.dumps(event) + "\n" for event in events)
    for rest in ("", '{"event": "rou'):
        tmp_path.joinpath("log.jsonl").write_text(text + rest)
        assert results.read_log(tmp_path) == events


def test_a_log_of_version_1_is_read_under_the_names_of_today(tmp_path):
    old = [dict(event="start", replicas=3, rounds=1), dict(event="round", round=1), dict(event="end", wait_seconds=2.0)]
    tmp_path.joinpath("log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in old))
    start, round_event, finished = results.read_log(tmp_path)
    assert start == dict(event="start", num_replicas=3, num_rounds=1)
    assert round_event == old[1] and finished == dict(event="finished", straggler_seconds=2.0)


def test_nested_keys_and_values_of_old_rows_are_translated(empty):
    row = dict(setting=dict(outer_step=0.5), of="SGD")
    results.append_row("compare_methods", row)
    results.append_row("flatness", row)
    assert results.read_rows("compare_methods") == [dict(config=dict(outer_lr=0.5), of="SGD")]
    assert results.read_rows("flatness") == [dict(setting=row["setting"], subject="SGD, matched steps")]


def test_commands_name_no_directory_of_this_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/here/averaging.py", "test", "--data", "/here/raw", "--tasks", "mnist"])
    assert results.command_line() == "python benchmarks/averaging.py test --data DIR --tasks mnist"
