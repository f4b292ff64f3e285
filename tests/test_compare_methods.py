import pytest

from benchmarks import compare_methods as cm
from benchmarks import results, trials


def cells(table):
    """Return the cells of a Markdown table, line by line, without the header."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


# Rows and tables


@pytest.fixture
def add_rows(monkeypatch, tmp_path):
    """Append one row per error to an empty directory of results."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)

    def add_rows(config, *errors, task="mnist-2000", seeds=cm.SEEDS):
        for seed, error in zip(seeds, errors, strict=False):
            results.append_row(cm.NAME, dict(task=task, config=config, seed=seed, error=error))

    return add_rows


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], ["-1.00", "better", "0.000255", "3, 3"]),
        ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9], ["+1.00", "worse", "0.000255"]),
        ([1.0, 2.0, 3.0], [1.5, 2.5, 3.5], ["-0.50", "not significant", "0.573"]),
        ([1.0, 1.0, 1.0001], [1.5, 2.0, 2.5], ["not significant", "0.0742"]),  # significant if variances were equal
        ([1.0], [2.0, 2.1], ["-1.05", "1, 2"]),
        ([1.0, float("nan")], [2.0, 2.1], ["diverged"]),
        ([1.0, 1.1], [], ["not run"]),
    ],
)
def test_comparison_states_difference_significance_and_n(ours, theirs, words):
    text = cm.compare(ours, theirs)
    assert all(word in text for word in words)
    assert len(ours) > 1 or "p =" not in text


def test_table_compares_with_sgd_at_matched_steps_and_compute(add_rows):
    add_rows(cm.SGD, 2.0, 2.1, 1.9)
    add_rows(cm.SGD | dict(length=3), 0.5, 0.6, 0.4)
    add_rows({}, 1.0, 1.1, 0.9)
    for length, error in ((4, 3.0), (12, 2.0)):
        add_rows(cm.SGD | dict(length=length), error, error + 0.1)
    add_rows(dict(length=4), 1.0, 1.1)
    sgd, parle, _, _, longer_parle, _ = cells(cm.table())
    assert (sgd[1], parle[1], longer_parle[1]) == ("SGD", "Parle", "Parle")
    assert longer_parle[6].startswith("-2.00") and longer_parle[7].startswith("-1.00")
    assert parle[2:6] == ["600", "1,800", "1.00 ± 0.10", "3"]
    assert parle[6].startswith("-1.00, better") and parle[7].startswith("+0.50, worse")


def test_summary_shows_what_has_been_run(add_rows):
    add_rows(cm.SGD, 2.0)
    add_rows(cm.SGD | dict(length=2), 9.0)
    add_rows(cm.SGD | dict(length=3), 1.5)
    add_rows(cm.METHODS[cm.SELECTED], 1.0)
    (line,) = cells(cm.summary())
    assert line == ["mnist-2000", "600", "2.00", "1.50", *["not run"] * 4, "1.00"]


def test_sweep_shows_missing_and_diverged_seeds(add_rows):
    add_rows(dict(gamma=0.0), 1.0, 1.1, 0.9)
    add_rows(dict(gamma=0.01), 2.0)
    add_rows(dict(gamma=0.1), 3.0, None, None)
    text = "0.0: 1.00 ± 0.10; 0.01: 2.00 (1 of 3 seeds); 0.1: diverged (2 of 3)"
    assert cells(cm.sweeps())[-1][1:] == ["gamma", "Parle", text]


def test_each_trial_is_run_once_however_its_config_is_written(add_rows):
    missing = list(cm.missing_trials(["methods"]))
    assert len(missing) == len({(trials.config_key(task, config), seed) for task, config, seed in missing})
    assert len(missing) == len(cm.PANELS["methods"]) * len(cm.TASKS) * len(cm.SEEDS)
    add_rows(dict(replicas=3, gamma=0.01), 1.0)
    assert ("mnist-2000", {}, 42) in missing
    assert ("mnist-2000", {}, 42) not in cm.missing_trials(["methods"])


def test_new_seeds_are_run_and_reported_separately(add_rows):
    assert {seed for *_, seed in cm.missing_trials(["new-seeds"])} == {45, 46, 47}
    assert {seed for *_, seed in cm.missing_trials(["methods", "longest"])} == {42, 43, 44}
    for seeds, change in ((cm.SEEDS, 5.0), (cm.NEW_SEEDS, 0.0)):
        selected, sgd = cm.METHODS[cm.SELECTED] | dict(length=4), cm.SGD | dict(length=12)
        add_rows(selected, 1.0 + change, 1.1 + change, task="cifar-5000", seeds=seeds)
        add_rows(sgd, 2.0 + change, 2.1 + change, task="cifar-5000", seeds=seeds)
    (line,) = cells(cm.new_seeds())
    assert line[:5] == ["4,000", "1.05 ± 0.07", "SGD", "12,000", "2.05 ± 0.07"] and "better" in line[5]
    assert "1.05" not in cm.table() and "6.05" in cm.table()


def test_every_config_of_the_panels_has_a_method_name():
    panels = ("methods", "long", "longest", "new-seeds")
    assert {cm.method_name(config) for panel in panels for config in cm.PANELS[panel]} == {*cm.METHODS}


def test_figures_show_means_and_mark_diverged_trials(add_rows):
    for config in (cm.SGD, cm.SGD | dict(length=3), cm.METHODS[cm.SELECTED], dict(gamma=0.1)):
        add_rows(config, 40.0, 41.0, task="cifar-5000")
    add_rows(dict(gamma=0.0), 40.0, None, task="cifar-5000")
    axis = cm.draw_comparison().axes[0]
    bars, labels = axis.get_legend_handles_labels()
    shown = [list(bar[0].get_ydata()) for bar in bars]
    assert len(labels) == 3 and sorted(map(len, shown)) == [0, 1, 2]
    assert {error for errors in shown for error in errors} == {40.5}
    (gamma,) = (axis for axis in cm.draw_sweeps().axes if axis.get_title() == "gamma")
    crosses = [list(line.get_xdata()) for line in gamma.lines if line.get_marker() == "x"]
    assert crosses == [[0], []]  # Parle's trials with gamma = 0, one of which diverged
