import pytest
import torch

from benchmarks import claim, record
from parle import scope


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """Keep rows of a task for these errors, one a seed."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)

    def rows(setting, *errors, task="mnist-2000", seeds=claim.SEEDS):
        for seed, error in zip(seeds, errors, strict=False):
            record.keep("claim", dict(task=task, setting=setting, seed=seed, error=error))

    return rows


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], "wins, -1.00 (p 0.000255)"),
        ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9], "loses, +1.00 (p 0.000255)"),
        ([1.0, 2.0, 3.0], [1.5, 2.5, 3.5], "ties, -0.50 (p 0.573)"),
        ([1.0, 1.1, 0.9], [1.2, 1.3, 1.1], "ties, -0.20 (p 0.0705)"),  # 2.4 standard errors of three seeds each
        ([1.0, 1.0, 1.0001], [1.5, 2.0, 2.5], "ties, -1.00 (p 0.0742)"),  # wins, were the variances equal
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
    assert lines[3] == [
        "mnist-2000",
        "Parle",
        "600",
        "1,800",
        "1.00 ± 0.10",
        "3",
        "wins, -1.00 (p 0.000255)",
        "loses, +0.50 (p 0.0036)",
    ]


def test_what_has_a_row_is_not_run_again_however_its_setting_is_written(rows):
    before = list(claim.missing(["method"]))
    assert len(before) == len({(task, claim.same(task, setting), seed) for task, setting, seed in before})
    assert len(before) == len(claim.PANELS["method"]) * len(claim.TASKS) * len(claim.SEEDS)
    rows(dict(replicas=3, gamma=0.01), 1.0)
    assert ("mnist-2000", {}, 42) in before
    assert ("mnist-2000", {}, 42) not in claim.missing(["method"])


def test_the_summary_sets_sgd_beside_sgd_of_three_times_the_mini_batches(rows):
    rows(claim.SGD, 2.0)
    rows(claim.SGD | dict(longer=2), 9.0)
    rows(claim.SGD | dict(longer=3), 1.5)
    rows(claim.CHOSEN, 1.0)
    assert claim.summary().splitlines()[2:] == [
        "| mnist-2000 | 600 | 2.00 | 1.50 | not run | not run | not run | not run | 1.00 |"
    ]


def test_both_figures_show_what_there_is(rows, monkeypatch, tmp_path):
    monkeypatch.setattr(record, "FIGURES", tmp_path / "figures")
    for setting in (claim.SGD, claim.SGD | dict(longer=3), claim.CHOSEN, dict(gamma=0.1)):
        rows(setting, 40.0, 41.0, task="cifar-5000")
    rows(dict(gamma=0.0), 40.0, None, task="cifar-5000")
    (methods, _), sweeps = claim.draw_methods().axes, claim.draw_sweeps().axes
    bars, labels = methods.get_legend_handles_labels()
    shown = {label: list(bar[0].get_ydata()) for bar, label in zip(bars, labels, strict=True)}
    assert {label: errors for label, errors in shown.items() if errors} == {
        "SGD": [40.5, 40.5],
        "Parle, rho 0.1": [40.5],
    }
    (gamma,) = (axis for axis in sweeps if axis.get_title() == "gamma")
    crosses = [list(line.get_xdata()) for line in gamma.lines if line.get_marker() == "x"]
    assert crosses == [[0], []]  # Parle's trials with gamma 0, of which one diverged
    assert [axis.get_title() for axis in sweeps[1:]] == [changed for changed in claim.SWEEPS if changed != "outer_step"]
    claim.draw()
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"claim.png", "sweeps.png"}


def test_what_was_chosen_is_tried_with_seeds_of_its_own(rows):
    assert {seed for *_, seed in claim.missing(["fresh"])} == {45, 46, 47}
    assert {seed for *_, seed in claim.missing(["method", "longest"])} == {42, 43, 44}
    for seeds, change in ((claim.SEEDS, 5.0), (claim.FRESH, 0.0)):
        rows(claim.CHOSEN | dict(longer=4), 1.0 + change, 1.1 + change, task="cifar-5000", seeds=seeds)
        rows(claim.SGD | dict(longer=12), 2.0 + change, 2.1 + change, task="cifar-5000", seeds=seeds)
    assert claim.fresh().splitlines()[2:] == [
        "| 4,000 | 1.05 ± 0.07 | SGD | 12,000 | 2.05 ± 0.07 | wins, -1.00 (p 0.00496) | 2 |"
    ]
    assert "1.05" not in claim.table() and "6.05" in claim.table()


def test_every_method_has_its_name_however_long():
    assert {claim.method_name(s) for panel in ("method", "longer", "longest") for s in claim.PANELS[panel]} == {
        *claim.METHODS
    }


def test_a_sweep_says_of_every_value_what_was_found_and_how_often_it_diverged(rows):
    rows(dict(gamma=0.0), 1.0, 1.1, 0.9)
    rows(dict(gamma=0.01), 2.0)
    rows(dict(gamma=0.1), 3.0, None, None)
    assert claim.sweeps().splitlines()[-1].split(" | ")[1:] == [
        "gamma",
        "Parle",
        "0.0: 1.00 ± 0.10; 0.01: 2.00 (1 of 3 seeds); 0.1: diverged (2 of 3) |",
    ]


def test_a_trial_that_diverges_is_kept_as_that(tmp_path, monkeypatch):
    monkeypatch.setitem(claim.TASKS, "tiny", claim.Task("digits", 300, 1, claim.lenet, False, 0.0, 30))
    row = claim.trial("tiny", dict(sync_every=2, lr=1e12), 42, None, tmp_path)
    assert row["error"] is None and 0 < row["diverged"] <= 30


@pytest.fixture
def tiny(monkeypatch):
    """A task of four mini-batches, three to an epoch."""
    task = claim.Task("digits", 300, 1, claim.lenet, False, 0.002, 4)
    monkeypatch.setitem(claim.TASKS, "tiny", task)
    monkeypatch.setattr(claim, "CURVE", ())
    return task


@pytest.fixture
def built(tiny, tmp_path):
    def built(seed=42, **changed):
        return claim.build(tiny, claim.usual("tiny") | changed, seed, claim.load(tiny, None, tmp_path))

    return built


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (dict(), dict(lr=0.1, momentum=0.9, weight_decay=0.002, gamma=0.01, rho=0.01, alpha=0.75, sync_every=25)),
        (dict(), dict(outer_step=1.0, outer_momentum=0.9, batches_per_epoch=3)),
        (dict(gamma=0.3, rho=0.2, alpha=0.5), dict(gamma=0.3, rho=0.2, alpha=0.5)),
        (dict(sync_every=5, weight_decay=0.0), dict(sync_every=5, weight_decay=0.0)),
        (dict(outer_step=0.5, outer_momentum=0.5), dict(outer_step=5.0, outer_momentum=0.5)),
        (dict(scoping=3), dict(batches_per_epoch=1)),
        (dict(frac=0.5), dict(batches_per_epoch=2)),
    ],
)
def test_a_setting_reaches_the_optimizer(built, changed, expected):
    group = built(**changed)[2].param_groups[0]
    assert {name: group[name] for name in expected} == expected


def test_without_scoping_nothing_grows(built):
    assert scope(0.01, 10_000, built(scoping=0)[2].param_groups[0]["batches_per_epoch"], 1.0) == pytest.approx(
        0.01, rel=1e-4
    )


def test_replicas_start_alike_and_see_the_data_in_orders_of_their_own(built):
    (first, second), sources, _ = built(replicas=2)
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))
    (_, ours), (_, theirs) = map(next, sources)
    assert not torch.equal(ours, theirs)
    (other, _), _, _ = built(replicas=2, seed=43)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    assert [len(source.share) for source in built(replicas=2, frac=0.5)[1]] == [150, 150]


@pytest.fixture
def ended(tiny, tmp_path, monkeypatch):
    """The row of a trial of two replicas, and its optimizer as it was at the end."""
    seen = []
    evaluate = claim.engine.evaluate

    def spy(optimizer, *rest, **options):
        seen.append(optimizer)
        return evaluate(optimizer, *rest, **options)

    def ended(**changed):
        monkeypatch.setattr(claim.engine, "evaluate", spy)
        row = claim.trial("tiny", changed | dict(replicas=2, sync_every=2), 42, None, tmp_path)
        return row, seen[-1]

    return ended


@pytest.mark.parametrize(
    ("changed", "inner", "outer"),
    [
        (dict(), 0.004, 0.004),
        (dict(inner_drops=False), 0.1, 0.004),
        (dict(outer_step=0.5), 0.004, 0.5),
    ],
)
def test_what_drops_is_what_the_setting_says(ended, changed, inner, outer):
    row, optimizer = ended(**changed)
    group = optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(inner) and group["outer_step"] * group["lr"] == pytest.approx(outer)
    assert (row["batches"], row["gradients"], len(row["replica_errors"])) == (4, 8, 2)


def test_a_run_is_as_much_longer_as_the_setting_says(ended):
    row, optimizer = ended(longer=3)
    assert (row["batches"], row["gradients"], optimizer.rounds) == (12, 24, 6)


@pytest.mark.parametrize("keeps", [True, False])
def test_the_inner_momentum_is_cleared_at_a_sync_where_the_setting_says_so(ended, keeps):
    _, optimizer = ended(keeps_momentum=keeps)
    assert all(vectors["inner_momentum_buffer"].any() == keeps for vectors in optimizer.vectors)


@pytest.mark.parametrize(("method", "step", "momentum"), [("Averaging", 1.0, 0.0), ("DiLoCo", 0.7, 0.9)])
def test_averaging_and_diloco_are_sgd_and_what_they_do_with_the_mean(ended, built, method, step, momentum):
    _, optimizer = ended(**claim.METHODS[method], longer=3)
    networks, sources, _ = built(**claim.METHODS[method], replicas=2)
    sgd = [torch.optim.SGD(n.parameters(), 0.1, 0.9, weight_decay=0.002, nesterov=True) for n in networks]
    start = [parameter.detach().clone() for parameter in networks[0].parameters()]
    buffers = [torch.zeros_like(tensor) for tensor in start]
    for done in range(1, 13):
        claim.gradients(networks, sources)
        for one in sgd:
            one.step()
            one.param_groups[0]["lr"] *= 0.2 if done in (6, 9) else 1.0
        together = zip(start, buffers, *(network.parameters() for network in networks), strict=True)
        for own, buffer, *ours in together if done % 2 == 0 else ():
            moved = own - (ours[0] + ours[1]).detach() / 2
            buffer.mul_(momentum).add_(moved)
            own.sub_(step * (moved + momentum * buffer))
            for parameter in ours:
                parameter.data.copy_(own)
    optimizer.copy_master_to(networks[1])
    for own, master in zip(start, networks[1].parameters(), strict=True):
        assert torch.allclose(own, master, rtol=1e-4, atol=1e-5)
    for vectors in optimizer.vectors:  # as a round begins
        assert all(torch.equal(vectors[name], optimizer.master) for name in ("weights", "anchor", "inner_avg"))


def test_a_network_is_tested_with_batch_norm_statistics_of_its_own(built, tiny, tmp_path):
    (network, *_), _, _ = built()
    data = claim.load(tiny, None, tmp_path)
    before = claim.test(network, data)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.fill_(100)
    assert claim.test(network, data) == before
