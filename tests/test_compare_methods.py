import pytest
import torch
from torch import nn

from benchmarks import compare_methods as cm
from benchmarks import results
from parle.algorithm import scoped


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
    trials = list(cm.missing_trials(["methods"]))
    assert len(trials) == len({(cm.config_key(task, config), seed) for task, config, seed in trials})
    assert len(trials) == len(cm.PANELS["methods"]) * len(cm.TASKS) * len(cm.SEEDS)
    add_rows(dict(replicas=3, gamma=0.01), 1.0)
    assert ("mnist-2000", {}, 42) in trials
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


# Trials


def linear_model(data):
    """Return a model that is close to chance level at first and better after four steps."""
    model = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 10))
    model[2].weight.data.mul_(0.01)
    return model


@pytest.fixture
def task(monkeypatch):
    """A task of four steps per replica, with three batches per epoch."""
    task = cm.Task("digits", 300, 1, linear_model, False, 0.002, 4)
    monkeypatch.setitem(cm.TASKS, "tiny", task)
    monkeypatch.setattr(cm, "EVAL_FRACTIONS", ())
    return task


@pytest.fixture
def build(task, proc):
    def build(seed=42, **config):
        return cm.build_replicas(task, cm.defaults("tiny") | config, seed, cm.load_data(task, None, proc))

    return build


@pytest.fixture
def run(task, proc, monkeypatch):
    """Run a trial of two replicas. Return its row, and the optimizer at its end."""
    optimizers = []
    evaluate = cm.evaluation.evaluate

    def spy(optimizer, *rest, **options):
        optimizers.append(optimizer)
        return evaluate(optimizer, *rest, **options)

    def run(**config):
        monkeypatch.setattr(cm.evaluation, "evaluate", spy)
        row = cm.run_trial("tiny", config | dict(replicas=2, sync_every=2), 42, None, proc)
        return row, optimizers[-1]

    return run


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (dict(), dict(lr=0.1, momentum=0.9, weight_decay=0.002, gamma=0.01, rho=0.01, alpha=0.75, sync_every=25)),
        (dict(), dict(outer_lr_scale=1.0, outer_momentum=0.9, batches_per_epoch=3)),
        (dict(gamma=0.3, rho=0.2, alpha=0.5), dict(gamma=0.3, rho=0.2, alpha=0.5)),
        (dict(sync_every=5, weight_decay=0.0), dict(sync_every=5, weight_decay=0.0)),
        (dict(outer_lr=0.5, outer_momentum=0.5), dict(outer_lr_scale=5.0, outer_momentum=0.5)),
        (dict(scoping_rate=3), dict(batches_per_epoch=1)),
        (dict(frac=0.5), dict(batches_per_epoch=2)),
    ],
)
def test_config_reaches_the_optimizer(build, config, expected):
    group = build(**config)[2].param_groups[0]
    assert {name: group[name] for name in expected} == expected


def test_without_scoping_coefficients_stay_constant(build):
    nb = build(scoping_rate=0)[2].param_groups[0]["batches_per_epoch"]
    assert scoped(0.01, 10_000, nb, 1.0) == pytest.approx(0.01, rel=1e-4)


def test_replicas_share_initial_weights_but_not_data_order(build):
    (first, second), batches, _ = build(replicas=2)
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))
    (_, ours), (_, theirs) = map(next, batches)
    assert not torch.equal(ours, theirs)
    (other, _), _, _ = build(replicas=2, seed=43)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize(
    ("config", "inner", "outer"),
    [
        (dict(), 0.004, 0.004),
        (dict(decay_inner_lr=False), 0.1, 0.004),
        (dict(outer_lr=0.5), 0.004, 0.5),
    ],
)
def test_inner_and_outer_lr_decay_as_configured(run, config, inner, outer):
    row, optimizer = run(**config)
    group = optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(inner) and group["outer_lr_scale"] * group["lr"] == pytest.approx(outer)
    assert (row["steps"], row["gradient_evaluations"], len(row["replica_errors"])) == (4, 8, 2)


def test_length_multiplies_the_steps(run):
    row, optimizer = run(length=3)
    assert (row["steps"], row["gradient_evaluations"], optimizer.rounds_done) == (12, 24, 6)


@pytest.mark.parametrize("keep", [True, False])
def test_inner_momentum_is_cleared_at_a_sync_if_configured(run, keep):
    _, optimizer = run(keep_inner_momentum=keep)
    assert all(state["inner_momentum_buffer"].any() == keep for state in optimizer.state.values())


def test_a_diverged_trial_has_no_error(run, task, proc):
    with pytest.warns(UserWarning, match="diverge"):
        row = cm.run_trial("tiny", dict(sync_every=2, lr=1e12), 42, None, proc)
    assert row["error"] is None and 0 < row["diverged"] <= 4


@pytest.mark.parametrize(("method", "step", "momentum"), [(cm.LOCAL_SGD, 1.0, 0.0), ("DiLoCo", 0.7, 0.9)])
def test_local_sgd_and_diloco_equal_their_definitions(run, build, method, step, momentum):
    _, optimizer = run(**cm.METHODS[method], length=3)
    networks, batches, _ = build(**cm.METHODS[method], replicas=2)
    sgd = [torch.optim.SGD(n.parameters(), 0.1, 0.9, weight_decay=0.002, nesterov=True) for n in networks]
    anchors = [parameter.detach().clone() for parameter in networks[0].parameters()]
    buffers = [torch.zeros_like(tensor) for tensor in anchors]
    for done in range(1, 13):
        cm.compute_gradients(networks, batches)
        for each in sgd:
            each.step()
            each.param_groups[0]["lr"] *= 0.2 if done in (6, 9) else 1.0
        tensors = zip(anchors, buffers, *(network.parameters() for network in networks), strict=True)
        for anchor, buffer, *replicas in tensors if done % 2 == 0 else ():
            outer_gradient = anchor - (replicas[0] + replicas[1]).detach() / 2
            buffer.mul_(momentum).add_(outer_gradient)
            anchor.sub_(step * (outer_gradient + momentum * buffer))
            for parameter in replicas:
                parameter.data.copy_(anchor)
    optimizer.copy_master_to(networks[1])
    for anchor, master in zip(anchors, networks[1].parameters(), strict=True):
        assert torch.allclose(anchor, master, rtol=1e-4, atol=1e-5)
    for group in optimizer.param_groups:  # as at the start of a round
        for parameter, first in zip(group["params"], optimizer.param_groups[0]["params"], strict=True):
            own, master = optimizer.state[parameter], optimizer.state[first]["master"]
            assert all(torch.equal(vector, master) for vector in (parameter, own["anchor"], own["inner_avg"]))


def test_batch_norm_is_recalibrated_before_a_test(task, proc):
    torch.manual_seed(0)
    data = cm.load_data(task, None, proc)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    before = cm.test_error(network, data)
    network[1].running_mean.fill_(100)
    assert cm.test_error(network, data) == before
