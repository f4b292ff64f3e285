import pytest

from benchmarks import claim, readme, record


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """Keep rows of a task for these errors, one a seed."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)

    def rows(setting, *errors, task="mnist-2000"):
        for seed, error in zip(claim.SEEDS, errors, strict=False):
            record.keep("claim", dict(task=task, setting=setting, seed=seed, error=error))

    return rows


def test_the_tables_of_both_readmes_are_what_the_results_say():
    for path in readme.FILES:
        assert readme.filled(path.read_text()) == path.read_text(), f"run python benchmarks/readme.py: {path}"


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], "wins, -1.00"),
        ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9], "loses, +1.00"),
        ([1.0, 2.0, 3.0], [1.5, 2.5, 3.5], "ties, -0.50"),
        ([1.0], [2.0, 2.1], "not run"),
        ([1.0, 1.1], [], "not run"),
    ],
)
def test_a_verdict_needs_two_standard_errors_and_two_seeds(ours, theirs, words):
    assert claim.verdict(ours, theirs) == words


def test_each_is_compared_with_sgd_of_as_many_mini_batches_and_of_as_many_gradients(rows):
    rows(claim.SGD, 2.0, 2.1, 1.9)
    rows(claim.SGD | dict(longer=3), 0.5, 0.6, 0.4)
    rows({}, 1.0, 1.1, 0.9)
    cells = [cell.strip() for cell in claim.table().splitlines()[-1].split("|")[1:-1]]
    assert cells == ["mnist-2000", "Parle", "600", "1,800", "1.00 ± 0.10", "wins, -1.00", "loses, +0.50"]


def test_what_has_a_row_is_not_run_again_however_its_setting_is_written(rows):
    before = list(claim.missing(["method"]))
    assert len(before) == len({(task, claim.same(setting), seed) for task, setting, seed in before}) == 36
    rows(dict(replicas=3, gamma=0.01), 1.0)
    assert ("mnist-2000", {}, 42) in before
    assert ("mnist-2000", {}, 42) not in claim.missing(["method"])


def test_every_setting_of_a_panel_is_named():
    for panel, settings in claim.PANELS.items():
        for setting in settings:
            assert panel in ("method", "longer") or claim.label(setting, panel)
            assert panel not in ("method", "longer") or claim.name(setting)
