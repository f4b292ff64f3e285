import pytest

from benchmarks import averaging, results
from tests.test_compare_methods import cells


@pytest.fixture
def add_row(monkeypatch, tmp_path):
    """Append a row to an empty directory of results."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)

    def add_row(config, error, *averaged, task=averaging.SELECTION_TASK, seed=42):
        errors = dict(zip(map(str, config["averages"]), averaged, strict=True)) if error is not None else {}
        results.append_row(
            averaging.NAME, dict(task=task, config=config, seed=seed, error=error, averaged_errors=errors)
        )

    return add_row


@pytest.fixture
def selection(add_row):
    """Rows in which the second setting of a method is best without averaging, and the third with decay 0.95."""
    for method, configs in averaging.GRIDS.items():
        for number, config in enumerate(configs):
            for schedule in averaging.SCHEDULES:
                full = averaging.selection_config(method, config, schedule)
                errors = [50.0, 50.0, 50.0, 50.0, 50.0]
                if (number, schedule) == (1, "cosine"):
                    errors = [30.0, 31.0, 31.0, 31.0, 31.0]
                if (number, schedule) == (len(configs) - 1, "constant"):
                    errors = [40.0, 40.0, 40.0, 29.0, 40.0]
                add_row(full, *errors)
    return add_row


def test_each_setting_is_tried_once_on_validation_images():
    trials = list(averaging.select_trials())
    keys = {averaging.config_key(task, config) for task, config, _ in trials}
    assert len(keys) == len(trials) == len(averaging.SCHEDULES) * sum(map(len, averaging.GRIDS.values()))
    assert {config["split"] for _, config, _ in trials} == {"validation"}


def test_the_lowest_validation_error_is_selected_without_and_with_averaging(selection):
    for method, configs in averaging.GRIDS.items():
        assert averaging.selected(method, averaged=False) == (configs[1], "cosine", 0.0)
        assert averaging.selected(method, averaged=True) == (configs[-1], "constant", 0.95)
    tests = list(averaging.test_trials(["cifar-5000"]))
    assert all("split" not in config for _, config, _ in tests)
    assert averaging.SELECTION_SEED not in {seed for *_, seed in tests}


def test_nothing_is_tested_before_everything_was_tried(add_row):
    with pytest.raises(SystemExit, match="SGD"):
        next(averaging.test_trials(["cifar-5000"]))


def test_a_diverged_setting_is_not_selected(selection):
    method, config = "Parle", averaging.GRIDS["Parle"][1]
    selection(averaging.selection_config(method, config, "cosine"), None)  # the later row counts
    assert averaging.selected(method, averaged=False)[2] == 0.0
    assert averaging.selected(method, averaged=False)[:2] != (config, "cosine")


def test_table_compares_averaged_with_averaged(selection):
    for averaged, errors in ((False, (30.0, 35.0)), (True, (28.0, 33.0))):
        for method, error in zip(("Parle", "SGD"), errors, strict=True):
            config = averaging.test_config(method, 4, averaged)
            for seed in (42, 43):
                selection(config, *[error + 0.1 * (seed - 42)] * 5, seed=seed)
    selection(averaging.test_config("DiLoCo", 4, averaged=False), None)
    plain_sgd, diverged, plain, averaged_sgd, averaged = cells(averaging.table())
    assert "diverged" in diverged[5] and diverged[7] == "diverged"
    assert [line[2:4] for line in (plain_sgd, plain)] == [["no", "SGD"], ["no", "Parle"]]
    assert [line[2:4] for line in (averaged_sgd, averaged)] == [["yes", "SGD"], ["yes", "Parle"]]
    assert plain[7].startswith("-5.00, better") and averaged[5] == "28.05 ± 0.07"
    assert averaged[8:] == ["not run", "not run"] and averaged_sgd[7] == ""
    axes = averaging.draw_errors().axes
    assert [len(axis.get_legend_handles_labels()[0]) for axis in axes] == [len(averaging.GRIDS)] * 2


def test_every_setting_has_a_name_of_its_own():
    for method, configs in averaging.GRIDS.items():
        assert len({averaging.describe(method, config) for config in configs}) == len(configs)
    step = averaging.constant_outer_step(0.03)
    assert step["outer_lr"] * (1 + 0.03 * 25 * 3) == pytest.approx(0.85)
