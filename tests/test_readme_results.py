import json

import pytest

from benchmarks import compare_methods, readme_results, results


@pytest.fixture(autouse=True)
def empty(monkeypatch, tmp_path):
    """An empty directory of results."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")


def cells(table):
    """Return the cells of a Markdown table without its header."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def add_row(flags, seed, rounds, error):
    row = dict(command=readme_results.command_line(flags, seed), seed=seed, num_replicas=3, num_rounds=rounds)
    results.append_row("readme_results", row | dict(error=error, train_seconds=10.0 * seed))


def test_table_counts_steps_per_replica():
    rounds = zip(readme_results.EXPERIMENTS.values(), (24, 117, 117, 469, 11_725), strict=True)
    for flags, count in rounds:
        for seed, error in ((42, 1.0), (43, 2.0)):
            add_row(flags, seed, count, error)
    lines = cells(readme_results.table())
    assert [line[0] for line in lines] == [*readme_results.EXPERIMENTS]
    assert [line[2] for line in lines] == ["600", "2,925", "2,925", "11,725", "11,725"]  # L is 25, or 1 with SGD
    assert {(line[3], line[4]) for line in lines} == {("1.50 ± 0.71", "420 to 430")}


def test_headline_compares_methods_at_matched_steps_and_compute():
    add_row(readme_results.MNIST, 42, 469, 0.5)
    add_row(readme_results.MNIST_SGD, 42, 11_725, 0.6)
    methods = compare_methods.METHODS
    trials = [("Parle", 4, 33.0), (compare_methods.SELECTED, 4, 32.0), ("SGD", 4, 34.0), ("SGD", 12, 31.0)]
    for name, length, error in trials:
        config = methods[name] | dict(length=length)
        results.append_row("compare_methods", dict(task="cifar-5000", config=config, seed=42, error=error))
    assert [line[1:] for line in cells(readme_results.headline())] == [
        ["not run"] * 5,
        ["11,725", "0.50", "0.60", "not run", "not run"],
        ["4,000", "32.00", "34.00", "31.00", "not run"],
        ["4,000", "33.00", "34.00", "31.00", "not run"],
    ]


def test_a_row_is_made_from_the_log_of_a_run(monkeypatch, tmp_path):
    start = dict(event="start", log_version=2, num_replicas=3, num_rounds=24, revision="abc")
    seconds = dict(train_seconds=15.0, straggler_seconds=1.0, sync_seconds=2.0)
    finish = dict(event="finished", master_error=3.0, **seconds)

    def run(command, **_):
        assert command[1:-4] == readme_results.command_line(readme_results.DIGITS, 42).split()[1:]
        folder = tmp_path / command[-1]
        folder.mkdir(parents=True)
        folder.joinpath("log.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps(finish)}\n")

    monkeypatch.setattr(readme_results.subprocess, "run", run)
    readme_results.run(readme_results.DIGITS, 42, None, tmp_path)
    (row,) = results.read_rows("readme_results")
    assert row.items() >= dict(error=3.0, num_replicas=3, num_rounds=24, revision="abc", **seconds).items()
