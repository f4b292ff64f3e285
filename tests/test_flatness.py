import pytest
import torch

import loader
import models
from benchmarks import flatness, results
from parle import checkpoint, cli, evaluation, experiment
from parle.distributed import Groups
from parle_gpu import Parle

pytestmark = pytest.mark.usefixtures("no_launcher")


@pytest.fixture
def empty(monkeypatch, tmp_path):
    """Empty directories of results and figures."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results, "FIGURES", tmp_path / "figures")


@pytest.fixture(scope="module")
def data(proc):
    return loader.load("digits", proc=proc)


def network(seed=1):
    torch.manual_seed(seed)
    model = models.build("lenet", channels=1, size=8, classes=10)
    return model, [parameter.detach().clone() for parameter in model.parameters()]


def parse(flags):
    return cli.complete(cli.build_parser("", "").parse_args(flags.split()), None)


def test_noise_has_the_given_relative_norm_in_every_tensor():
    _, weights = network()
    for before, after in zip(weights, flatness.add_noise(weights, 0.3, seed=5), strict=True):
        torch.testing.assert_close((after - before).norm(), 0.3 * before.norm(), rtol=1e-4, atol=1e-6)
    assert all(map(torch.equal, flatness.add_noise(weights, 0.0, seed=5), weights))


def test_directions_of_noise_depend_on_the_seed_only():
    (_, one), (_, other) = network(1), network(2)
    first, same, different = (
        (flatness.add_noise(own, 0.3, seed)[0] - own[0]) / own[0].norm()
        for own, seed in ((one, 5), (other, 5), (one, 6))
    )
    torch.testing.assert_close(first, same, rtol=1e-3, atol=1e-6)
    assert abs(torch.nn.functional.cosine_similarity(first.flatten(), different.flatten(), dim=0)) < 0.3


def test_lines_are_straight_and_lengths_relative():
    (_, first), (_, second) = network(1), network(2)
    assert all(map(torch.equal, flatness.interpolate(first, second, 0.0), first))
    assert all(map(torch.equal, flatness.interpolate(first, second, 1.0), second))
    middle = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(flatness.interpolate(first, second, 0.5), middle)
    ends = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])], [torch.tensor([3.0]), torch.tensor([[0.0, 5.0]])]
    assert flatness.relative_distance(*ends) == pytest.approx(0.2)


def test_networks_are_loaded_from_the_latest_checkpoint(data, tmp_path):
    args = parse("-d digits -n 2")
    replicas = [experiment.build_model(args, data) for _ in range(2)]
    optimizer = Parle([model.parameters() for model in replicas], **experiment.hyperparameters(args, 12))
    arguments = {name: value if not hasattr(value, "parts") else str(value) for name, value in vars(args).items()}
    metadata = dict(arguments=arguments, data={}, train_state={}, log_bytes=0)
    for _ in range(2):
        for parameter, state in optimizer.state.items():
            parameter.data.normal_()
            if "master" in state:
                state["master"].normal_()
        for group in optimizer.param_groups:
            group |= dict(rounds_done=group["rounds_done"] + 1, steps_per_round=25)
        checkpoint.save(tmp_path / checkpoint.FOLDER, optimizer, dict(enumerate(replicas)), metadata, Groups())
    master, (first, second) = flatness.load_networks(tmp_path, data)
    evaluated = experiment.build_model(args, data)
    optimizer.copy_master_to(evaluated)
    for weights, model in ((master, evaluated), (first, replicas[0]), (second, replicas[1])):
        assert all(map(torch.equal, weights, model.parameters()))
    assert not torch.equal(first[0], second[0])


def test_batch_norm_is_recalibrated_for_each_network(data):
    small = data._replace(train_images=data.train_images[:200], test_images=data.test_images[:100])
    small = small._replace(train_labels=data.train_labels[:200], test_labels=data.test_labels[:100])
    model, weights = network()
    expected = flatness.evaluate(model, weights, small)
    flatness.evaluate(model, flatness.add_noise(weights, 0.5, seed=5), small)  # leaves other statistics behind
    assert flatness.evaluate(model, weights, small) == expected
    logits = evaluation.predict(model, small.test_images, small)
    error = 100 * float((logits.argmax(1) != small.test_labels).double().mean())
    assert expected["test_error"] == pytest.approx(error)
    assert expected["test_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, small.test_labels)))


def test_every_measurement_covers_its_directions_or_points(monkeypatch):
    monkeypatch.setattr(flatness, "evaluate", lambda model, weights, data: {"test_loss": float(weights[0].sum())})
    _, weights = network()
    names = ["master", "replica", "another replica", flatness.MATCHED_STEPS, flatness.MATCHED_COMPUTE]
    networks = {name: [tensor + i for tensor in weights] for i, name in enumerate(names)}
    measured = {each: flatness.measure(*each, networks, None, None) for each in flatness.MEASUREMENTS}
    assert len(measured["master", 0.0]["test_loss"]) == 1
    assert len(set(measured[flatness.MATCHED_STEPS, 0.3]["test_loss"])) == flatness.NUM_DIRECTIONS
    losses = measured[f"master to {flatness.MATCHED_COMPUTE}", None]["test_loss"]
    ends = [float(networks[name][0].sum()) for name in ("master", flatness.MATCHED_COMPUTE)]
    assert len(losses) == len(flatness.LINE_POINTS) and [losses[0], losses[-1]] == pytest.approx(ends)


def test_an_interrupted_run_is_not_measured(data, monkeypatch, tmp_path):
    monkeypatch.setattr(flatness.reproduce_paper, "train", lambda *_: False)
    with pytest.raises(SystemExit, match="resume"):
        flatness.train(42, tmp_path, [], data)


def add_rows(seed, measurements=flatness.MEASUREMENTS, parle=flatness.PARLE):
    """Add made-up losses that increase linearly with the noise, and lines with a barrier of 0.5."""
    matched_steps, matched_compute = flatness.MATCHED_STEPS, flatness.MATCHED_COMPUTE
    starts = {"master": 0.2, "replica": 0.1, matched_steps: 0.1, matched_compute: 0.1}
    slopes = {"master": 0.5, "replica": 2.0, matched_steps: 3.0, matched_compute: 1.0}
    for subject, noise in measurements:
        row = dict(seed=seed, subject=subject, noise=noise, runs=[parle, flatness.SGD, flatness.SGD_LONG])
        if noise is None:
            losses = [0.1 + t * 0.2 + (0.5 if t == 0.5 else 0.0) for t in flatness.LINE_POINTS]
            row["distance"] = 0.25
        else:
            losses = [starts[subject] + slopes[subject] * noise] * (flatness.NUM_DIRECTIONS if noise else 1)
        values = dict(train_loss=losses, test_loss=losses, test_error=[10 * loss for loss in losses])
        results.append_row(flatness.NAME, row | values)


def test_tables_show_loss_increases_and_barriers_of_complete_seeds(empty):
    assert "|" not in flatness.table()
    add_rows(42)
    add_rows(43)
    add_rows(44, flatness.MEASUREMENTS[:-1])
    add_rows(44, parle="-m allcnn")  # not the run as defined now
    table = flatness.table()
    assert "42, 43" in table and "44" not in table
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    cells = {(line[0], line[1]): line[2:] for line in lines}
    same = " ± 0.0000"
    assert cells["master", "0.2"] == [f"0.3000{same}", f"0.3000{same}", f"0.1000{same}", "0.50 ± 0.00", "3.00 ± 0.00"]
    assert cells[flatness.MATCHED_STEPS, "0.2"][3] == "3.00 ± 0.00"
    assert cells[flatness.MATCHED_COMPUTE, "0.2"][2:4] == [f"0.2000{same}", ""]
    line = cells[f"master to {flatness.MATCHED_COMPUTE}", f"0.2500{same}"]
    assert line[2:] == [f"0.5000{same}", "1.00 ± 0.00", "7.00 ± 0.00", "3.00 ± 0.00"]


def test_sgd_runs_match_the_steps_and_the_compute_of_parle():
    steps = {}
    for name, flags in flatness.RUNS.items():
        args = parse(flags)
        steps[name] = experiment.build_schedule(args).num_rounds(469) * args.sync_every
        drops = [drop / args.epochs for drop in args.lr_drops]
        assert name == "parle" or drops == pytest.approx([0.6, 0.8], abs=0.005)
    assert steps == {"parle": 1175, "sgd": 1175, "sgd-long": 3 * 1175}
