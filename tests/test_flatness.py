import pytest
import torch

import checkpoint
import engine
import experiment
import loader
import models
import options
from benchmarks import flatness, record
from parle_gpu import Parle

pytestmark = pytest.mark.usefixtures("no_launcher")


@pytest.fixture
def results(monkeypatch, tmp_path):
    """A folder where nothing has been kept yet; and the picture goes beside it."""
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record, "FIGURES", tmp_path / "figures")


@pytest.fixture(scope="module")
def data(proc):
    return loader.load("digits", proc=proc)


def network(seed=1):
    torch.manual_seed(seed)
    model = models.build("lenet", channels=1, size=8, classes=10)
    return model, [parameter.detach().clone() for parameter in model.parameters()]


# Networks


def test_noise_has_the_stated_norm_in_every_tensor():
    _, weights = network()
    for before, after in zip(weights, flatness.noisy(weights, 0.3, seed=5), strict=True):
        torch.testing.assert_close((after - before).norm(), 0.3 * before.norm(), rtol=1e-4, atol=1e-6)


def test_noise_has_directions_of_the_seed_for_all_networks_alike():
    (_, one), (_, other) = network(1), network(2)
    directions = [
        [(after - before) / before.norm() for after, before in zip(flatness.noisy(own, 0.3, seed), own, strict=True)]
        for own, seed in ((one, 5), (other, 5), (one, 6))
    ]
    first, same, different = (tensors[0] for tensors in directions)  # of the first convolution
    torch.testing.assert_close(first, same, rtol=1e-3, atol=1e-6)
    assert abs(torch.nn.functional.cosine_similarity(first.flatten(), different.flatten(), dim=0)) < 0.3


def test_no_noise_leaves_the_network_as_it_is():
    _, weights = network()
    assert all(map(torch.equal, flatness.noisy(weights, 0.0, seed=5), weights))


def test_a_line_goes_straight_from_one_network_to_the_other():
    (_, first), (_, second) = network(1), network(2)
    assert all(map(torch.equal, flatness.between(first, second, 0.0), first))
    assert all(map(torch.equal, flatness.between(first, second, 1.0), second))
    middle = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(flatness.between(first, second, 0.5), middle)


def test_distance_is_in_units_of_the_first_norm():
    first, second = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])], [torch.tensor([3.0]), torch.tensor([[0.0, 5.0]])]
    assert flatness.distance(first, second) == pytest.approx(0.2)


def test_a_run_is_read_from_its_newest_checkpoint(data, tmp_path):
    args = options.resolve(options.parser("parle_gpu.py", "").parse_args(["-d", "digits", "-n", "2"]), None)
    replicas = [experiment.model(args, data) for _ in range(2)]
    optimizer = Parle([model.parameters() for model in replicas], **experiment.hyperparameters(args, 12))
    arguments = {name: value if not hasattr(value, "parts") else str(value) for name, value in vars(args).items()}
    facts = dict(arguments=arguments, progress={}, log_bytes=0)
    for _ in range(2):
        for vectors in optimizer.vectors:
            vectors["weights"].normal_()
        optimizer.master.normal_()
        optimizer.counters = optimizer.counters | dict(rounds=optimizer.rounds + 1)
        checkpoint.save(tmp_path / checkpoint.FOLDER, optimizer, [0, 1], facts, engine.ALONE, engine.ALONE)
    master, (first, second) = flatness.read(tmp_path, data)
    evaluated = experiment.model(args, data)
    optimizer.copy_master_to(evaluated)
    for weights, model in ((master, evaluated), (first, replicas[0]), (second, replicas[1])):
        assert all(map(torch.equal, weights, model.parameters()))
        assert [tensor.stride() for tensor in weights] == [tensor.stride() for tensor in model.parameters()]
    assert not torch.equal(first[0], second[0])


# Measuring


def test_batch_norm_is_recalibrated_for_the_weights_that_are_measured(data, monkeypatch):
    model, weights = network()
    expected = flatness.measure(model, weights, data)
    other = flatness.noisy(weights, 0.5, seed=5)
    flatness.measure(model, other, data)  # leaves the statistics of another network
    assert flatness.measure(model, weights, data) == expected
    flatness.measure(model, other, data)
    monkeypatch.setattr(engine, "recalibrate_batch_norm", lambda *_: None)
    assert flatness.measure(model, weights, data) != expected


def test_figures_are_those_of_the_network(data):
    model, weights = network()
    figures = flatness.measure(model, weights, data)
    logits = engine.predict(model, data.test_images, data)
    assert figures["test_error"] == pytest.approx(100 * float((logits.argmax(1) != data.test_labels).double().mean()))
    assert figures["test_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, data.test_labels)))
    assert figures["train_loss"] != figures["test_loss"]


def test_every_question_has_an_answer(data, monkeypatch):
    monkeypatch.setattr(flatness, "measure", lambda model, weights, data: {"test_loss": float(weights[0].sum())})
    model, weights = network()
    networks = {
        name: [tensor + i for tensor in weights]
        for i, name in enumerate(["master", "replica", "another replica", "SGD", flatness.AGAINST])
    }
    answers = {question: flatness.answer(*question, networks, model, data) for question in flatness.QUESTIONS}
    assert len(answers["master", 0.0]["test_loss"]) == 1
    assert len(set(answers["SGD", 0.3]["test_loss"])) == flatness.DRAWS
    line = answers[f"master to {flatness.AGAINST}", None]
    assert line["distance"] == flatness.distance(networks["master"], networks[flatness.AGAINST])
    ends = [float(networks[name][0].sum()) for name in ("master", flatness.AGAINST)]
    assert [line["test_loss"][0], line["test_loss"][-1]] == pytest.approx(ends)
    assert len(line["test_loss"]) == len(flatness.SHARES)


def test_a_run_that_was_stopped_is_not_measured(data, monkeypatch, tmp_path):
    monkeypatch.setattr(flatness.paper, "train", lambda *_: False)
    with pytest.raises(SystemExit, match="the same command goes on"):
        flatness.train(42, tmp_path, [], data)


# What is made of the rows


def keep_made_up(seed, questions=flatness.QUESTIONS, parle=flatness.PARLE):
    """SGD's loss rises with the noise from 0.1, the master's half as fast from 0.2, the replica's twice as fast."""
    starts = {"master": 0.2, "replica": 0.1, "SGD": 0.1, flatness.AGAINST: 0.1}
    slopes = {"master": 0.5, "replica": 2.0, "SGD": 3.0, flatness.AGAINST: 1.0}
    for of, radius in questions:
        row = dict(seed=seed, of=of, radius=radius, runs=[parle, flatness.SGD, flatness.LONG])
        if radius is None:
            losses = [0.1 + share * 0.2 + (0.5 if share == 0.5 else 0.0) for share in flatness.SHARES]
            row["distance"] = 0.25
        else:
            losses = [starts[of] + slopes[of] * radius] * (flatness.DRAWS if radius else 1)
        record.keep("flatness", row | dict(train_loss=losses, test_loss=losses, test_error=[10 * x for x in losses]))


def cells():
    lines = [line.strip("| ").split(" | ") for line in flatness.table().splitlines() if line.startswith("| ")]
    return {(line[0], line[1]): line[2:] for line in lines}


def test_the_tables_compare_the_rise_of_the_loss_with_that_of_sgd(results):
    for seed in flatness.SEEDS:
        keep_made_up(seed)
    lines = cells()
    same = " ± 0.0000"
    assert lines["master", "0.2"] == [f"0.3000{same}", f"0.3000{same}", f"0.1000{same}", "0.50 ± 0.00", "3.00 ± 0.00"]
    assert lines["replica", "0.2"][3] == "2.00 ± 0.00"
    assert lines["SGD", "0.2"][3] == "3.00 ± 0.00"
    assert lines[flatness.AGAINST, "0.2"][2:4] == [f"0.2000{same}", ""]
    assert (
        lines[f"master to {flatness.AGAINST}", f"0.2500{same}"][2] == f"0.5000{same}"
    )  # the barrier, above a line from 0.1 to 0.3
    assert lines[f"master to {flatness.AGAINST}", f"0.2500{same}"][3:] == ["1.00 ± 0.00", "7.00 ± 0.00", "3.00 ± 0.00"]


def test_only_seeds_of_which_nothing_is_missing_count(results):
    assert flatness.table() == "Nothing has been measured yet."
    keep_made_up(42)
    keep_made_up(43, flatness.QUESTIONS[:-1])
    keep_made_up(44, parle="-m allcnn")
    assert "Seeds 42." in flatness.table()


def test_the_picture_is_small(results):
    for seed in flatness.SEEDS:
        keep_made_up(seed)
    flatness.draw()
    content = (record.FIGURES / "flatness.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 100_000


def test_sgd_takes_as_many_mini_batches_as_a_replica_and_as_all_of_them():
    taken = {}
    for name, flags in flatness.RUNS.items():
        args = options.resolve(options.parser("parle_mpi.py", "").parse_args(flags.split()), None)
        options.check(args, None)
        taken[name] = engine.count_rounds(args.epochs, 469) * args.sync_every
        drops = [drop / args.epochs for drop in args.lr_drops]
        assert name == "parle" or drops == pytest.approx([0.6, 0.8], abs=0.005)
    assert taken == {"parle": 1175, "sgd": 1175, "sgd-long": 3 * 1175}
