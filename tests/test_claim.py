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
        ([1.0, 1.1, 0.9], [1.2, 1.3, 1.1], "ties, -0.20"),  # 2.4 standard errors of three seeds each
        ([1.0], [2.0, 2.1], "one seed, -1.05"),
        ([1.0, float("nan")], [2.0, 2.1], "diverged"),
        ([1.0, 1.1], [], "not run"),
    ],
)
def test_a_verdict_needs_a_significant_difference_and_two_seeds(ours, theirs, words):
    assert claim.verdict(ours, theirs) == words


def test_each_is_compared_with_sgd_of_as_many_mini_batches_and_of_as_many_gradients(rows):
    rows(claim.SGD, 2.0, 2.1, 1.9)
    rows(claim.SGD | dict(longer=3), 0.5, 0.6, 0.4)
    rows({}, 1.0, 1.1, 0.9)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in claim.table().splitlines()]
    assert [line[1] for line in lines[2:]] == ["SGD", "Parle", "SGD"]  # by length
    assert lines[3] == ["mnist-2000", "Parle", "600", "1,800", "1.00 ± 0.10", "3", "wins, -1.00", "loses, +0.50"]


def test_what_has_a_row_is_not_run_again_however_its_setting_is_written(rows):
    before = list(claim.missing(["method"]))
    assert len(before) == len({(task, claim.same(task, setting), seed) for task, setting, seed in before})
    assert len(before) == len(claim.PANELS["method"]) * len(claim.TASKS) * len(claim.SEEDS)
    rows(dict(replicas=3, gamma=0.01), 1.0)
    assert ("mnist-2000", {}, 42) in before
    assert ("mnist-2000", {}, 42) not in claim.missing(["method"])
    assert ("mnist-2000", {}, 45) in claim.missing(["method"], [45])


def test_every_method_has_its_name_however_long():
    assert {claim.name(s) for panel in ("method", "longer", "longest") for s in claim.PANELS[panel]} == {*claim.METHODS}


def test_a_sweep_says_of_every_value_what_was_found_and_how_often_it_diverged(rows):
    rows(dict(gamma=0.0), 1.0, 1.1, 0.9)
    rows(dict(gamma=0.01), 2.0)
    rows(dict(gamma=0.1), 3.0, None, None)
    assert claim.sweeps().splitlines()[-1].split(" | ")[1:] == [
        "gamma",
        "Parle",
        "0.0: 1.00 ± 0.10; 0.01: 2.00; 0.1: diverged (2 of 3) |",
    ]


def test_a_trial_that_diverges_is_kept_as_that(tmp_path, monkeypatch):
    monkeypatch.setitem(claim.TASKS, "tiny", claim.Task("digits", 300, 1, claim.lenet, False, 0.0, 30))
    row = claim.trial("tiny", dict(sync_every=2, lr=1e12), 42, None, tmp_path)
    assert row["error"] is None and 0 < row["diverged"] <= 30


@pytest.mark.parametrize(
    ("changed", "inner", "outer"),
    [
        (dict(), 0.004, 0.004),
        (dict(inner_drops=False), 0.1, 0.004),
        (dict(outer_step=0.5), 0.004, 0.5),
    ],
)
def test_what_drops_is_what_the_setting_says(tmp_path, monkeypatch, changed, inner, outer):
    monkeypatch.setitem(claim.TASKS, "tiny", claim.Task("digits", 300, 1, claim.lenet, False, 0.0, 4))
    monkeypatch.setattr(claim, "CURVE", ())
    seen = []
    evaluate = claim.engine.evaluate
    monkeypatch.setattr(
        claim.engine,
        "evaluate",
        lambda optimizer, *rest, **kw: (seen.append(optimizer), evaluate(optimizer, *rest, **kw))[1],
    )
    row = claim.trial("tiny", changed | dict(replicas=2, sync_every=2), 42, None, tmp_path)
    group = seen[0].param_groups[0]
    assert group["lr"] == pytest.approx(inner) and group["outer_step"] * group["lr"] == pytest.approx(outer)
    assert (row["batches"], row["gradients"], len(row["replica_errors"])) == (4, 8, 2)
