import pytest
import torch
from torch import nn

from benchmarks import trials
from parle.algorithm import scoped


def linear_model(data):
    """Return a model that is close to chance level at first and better after four steps."""
    model = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 10))
    model[2].weight.data.mul_(0.01)
    return model


@pytest.fixture
def task(monkeypatch):
    """A task of four steps per replica, with three batches per epoch."""
    task = trials.Task("digits", 300, 1, linear_model, False, 0.002, 4)
    monkeypatch.setitem(trials.TASKS, "tiny", task)
    monkeypatch.setattr(trials, "EVAL_FRACTIONS", ())
    return task


@pytest.fixture
def build(task, proc):
    def build(seed=42, **config):
        return trials.build_replicas(task, trials.defaults("tiny") | config, seed, trials.load_data(task, None, proc))

    return build


@pytest.fixture
def run(task, proc, monkeypatch):
    """Run a trial of two replicas. Return its row, and the optimizer at its end."""
    optimizers = []
    evaluate = trials.evaluation.evaluate

    def spy(optimizer, *rest, **options):
        optimizers.append(optimizer)
        return evaluate(optimizer, *rest, **options)

    def run(**config):
        monkeypatch.setattr(trials.evaluation, "evaluate", spy)
        row = trials.run_trial("tiny", config | dict(replicas=2, sync_every=2), 42, None, proc)
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
        row = trials.run_trial("tiny", dict(sync_every=2, lr=1e12), 42, None, proc)
    assert row["error"] is None and 0 < row["diverged"] <= 4


@pytest.mark.parametrize(("method", "step", "momentum"), [(trials.LOCAL_SGD, 1.0, 0.0), (trials.DILOCO, 0.7, 0.9)])
def test_local_sgd_and_diloco_equal_their_definitions(run, build, method, step, momentum):
    _, optimizer = run(**method, length=3)
    networks, batches, _ = build(**method, replicas=2)
    sgd = [torch.optim.SGD(n.parameters(), 0.1, 0.9, weight_decay=0.002, nesterov=True) for n in networks]
    anchors = [parameter.detach().clone() for parameter in networks[0].parameters()]
    buffers = [torch.zeros_like(tensor) for tensor in anchors]
    for done in range(1, 13):
        trials.compute_gradients(networks, batches)
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
    data = trials.load_data(task, None, proc)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    before = trials.test_error(network, data)
    network[1].running_mean.fill_(100)
    assert trials.test_error(network, data) == before


def trial(proc, checkpoint=None, seed=42, **config):
    config = dict(replicas=2, sync_every=2, length=3) | config
    return trials.run_trial("tiny", config, seed, None, proc, checkpoint)


def test_averages_equal_those_of_the_optimizer(run, build):
    row, _ = run(averages=[0.5], length=3, schedule="constant")
    networks, batches, plain = build(replicas=2, sync_every=2)
    optimizer = trials.Parle(
        [network.parameters() for network in networks],
        **{name: plain.param_groups[0][name] for name in ("lr", "weight_decay", "batches_per_epoch")},
        **dict(sync_every=2, master_average=0.5 ** (2 / 25)),
    )
    for _ in range(12):
        trials.compute_gradients(networks, batches)
        optimizer.step()
    optimizer.copy_master_to(networks[0])
    assert row["averaged_errors"] == {"0.5": trials.test_error(networks[0], batches[0].data)}
    assert row["averaged_errors"]["0.5"] != row["error"]


def test_averages_do_not_affect_training(task, proc):
    plain, averaged = trial(proc), trial(proc, averages=[0.9])
    assert all(plain[name] == averaged[name] for name in ("error", "loss", "replica_errors", "replica_distance"))


def test_the_decay_of_an_average_refers_to_the_same_number_of_steps_for_all_methods(task, proc, monkeypatch):
    decays = []
    monkeypatch.setattr(trials, "update_average", lambda *_, count, decay: decays.append(decay))
    for steps in (1, 2):
        trial(proc, averages=[0.5], sync_every=steps)
    assert decays == [0.5 ** (1 / 25)] * 12 + [0.5 ** (2 / 25)] * 6


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("one drop", [1.0, 1.0, 1.0, 0.2]),
        ("drops", [1.0, 1.0, 0.2, 0.04]),
        ("cosine", [1.0, 0.85355, 0.5, 0.14645]),
    ],
)
def test_schedules(task, proc, monkeypatch, schedule, factors):
    rates = []
    monkeypatch.setattr(trials, "set_lr", lambda optimizer, full, factor: rates.append(factor))
    trial(proc, schedule=schedule, length=1)
    assert rates == pytest.approx(factors, abs=1e-5)


def test_validation_images_are_training_images_that_are_not_trained_on(task, proc):
    everything = trials.loader.load("digits", None, proc)
    data = trials.load_data(task, None, proc, "validation")
    rows = {image.tobytes() for image in everything.train_images.numpy()}
    train, validation, test = (
        {image.tobytes() for image in images.numpy()}
        for images in (data.train_images, data.test_images, everything.test_images)
    )
    assert train and validation and not train & validation and train | validation <= rows
    assert not validation & test


def test_all_training_images_are_split_for_validation(task, proc, monkeypatch):
    monkeypatch.setattr(trials, "NUM_VALIDATION_IMAGES", 400)
    total = len(trials.loader.load("digits", None, proc).train_labels)
    data = trials.load_data(task._replace(num_train_images=total), None, proc, "validation")
    assert (len(data.train_labels), len(data.test_labels)) == (total - 400, 400)


def test_a_trial_resumes_from_its_checkpoint(task, proc, tmp_path, monkeypatch):
    config = dict(averages=[0.5], schedule="cosine")
    whole = trial(proc, **config)
    monkeypatch.setattr(trials, "CHECKPOINT_SECONDS", 0)
    path, step = tmp_path / "trials" / "trial.pt", trials.Parle.step

    def stop_in_the_middle(optimizer):
        step(optimizer)
        if (optimizer.rounds_done, optimizer.step_in_round) == (3, 1):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trials.Parle, "step", stop_in_the_middle)
        trial(proc, path, **config)
    assert torch.load(path)["progress"]["step"] == 6
    resumed = trial(proc, path, **config)
    del whole["seconds"], resumed["seconds"]
    assert resumed == whole
