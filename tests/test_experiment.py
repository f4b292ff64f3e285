import inspect
import json
import os
import signal
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import loader
import models
import parle_gpu
import parle_mpi
from parle import checkpoint, cli, distributed, evaluation, experiment, training
from parle.optimizer import ParleBase
from tests.test_checkpoint import tiny

pytestmark = pytest.mark.usefixtures("no_launcher")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """An empty folder where the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(line=""):
    return cli.build_parser("parle_gpu.py", "Parle.").parse_args(line.split())


def resolved(line="-d digits"):
    return cli.apply_defaults(typed(line), None)


def dataset(train=64, test=20):
    random = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (train + test, 8, 8, 1), generator=random, dtype=torch.uint8)
    labels = torch.arange(train + test) % 10
    parts = (images[:train], labels[:train], images[train:], labels[train:])
    return loader.Dataset("digits", *parts, torch.tensor([128.0]), torch.tensor([70.0]), 10, "/raw")


class Reader:
    """Gives the data sets that are here; fails with `error` for any other. Keeps what it was asked for."""

    def __init__(self, *here, error=None):
        self.here, self.error, self.asked = here, error or loader.DownloadError("no network"), []

    def __call__(self, args):
        self.asked.append(args)
        if args.dataset not in self.here:
            raise self.error
        return f"the images of {args.dataset}"


# Data


@pytest.mark.parametrize(("line", "name"), [("", "mnist"), ("-d svhn", "svhn"), ("-m allcnn", "cifar10")])
def test_the_named_or_default_data_set_is_loaded(line, name, capsys):
    read = Reader(name, "digits")
    args, data = experiment.load_data(typed(line), size=6, read=read, first=True)
    assert (args.dataset, data, len(read.asked)) == (name, f"the images of {name}", 1)
    assert args == cli.apply_defaults(typed(line), 6)
    assert args.replicas == 6
    assert tuple(capsys.readouterr()) == ("", "")


@pytest.mark.parametrize("first", [True, False])
def test_default_data_fall_back_to_digits_without_network(first, capsys):
    given = typed("-m allcnn")
    before = deepcopy(given)
    args, data = experiment.load_data(given, size=4, read=Reader("digits"), first=first)
    assert data == "the images of digits"
    assert args == cli.apply_defaults(typed("-m allcnn -d digits"), 4)
    assert (args.replicas, args.augment) == (4, False)  # CIFAR's are augmented
    assert given == before
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == int(first)
    assert not first or all(word in out for word in ("digits", "cifar10", "no network"))


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("-d mnist", loader.DownloadError("no network")),
        ("-m allcnn -d cifar10", loader.DownloadError("no network")),
        ("--data .", loader.DownloadError("no network")),
        ("", loader.DatasetError("damaged")),
    ],
)
def test_requested_or_damaged_data_are_never_replaced(line, error, capsys):
    read = Reader("digits", error=error)
    with pytest.raises(type(error)) as caught:
        experiment.load_data(typed(line), size=None, read=read, first=True)
    assert caught.value is error
    assert len(read.asked) == 1
    assert tuple(capsys.readouterr()) == ("", "")


# Replicas


@pytest.mark.parametrize("line", ["-d digits", "-d digits -m allcnn -s 3 --dropout 0.1"])
def test_the_seed_determines_the_initial_network(line):
    args, data = resolved(line), dataset()
    first = experiment.build_model(args, data)
    torch.rand(5)
    second = experiment.build_model(args, data)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert not {id(value) for value in first.parameters()} & {id(value) for value in second.parameters()}
    torch.manual_seed(args.seed)
    expected = models.build(args.model, 1, 8, 10, args.dropout)
    assert str(first) == str(expected)
    assert all(map(torch.equal, first.state_dict().values(), expected.state_dict().values()))
    other = experiment.build_model(resolved(f"{line} -s 99"), data)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_the_network_is_on_the_device_of_the_data():
    data = dataset()
    elsewhere = data._replace(train_labels=data.train_labels.to("meta"))
    assert {value.device.type for value in experiment.build_model(resolved(), elsewhere).parameters()} == {"meta"}


@pytest.mark.parametrize(("part", "rows"), [(None, 6), ((0, 2), 3), ((1, 4), 1)])
def test_batches_follow_the_arguments(part, rows):
    args, data = resolved("-d digits -b 6 -s 5 -n 3 --frac 0.5 --augment"), dataset()
    batches = experiment.build_batches(args, data, 2) if part is None else experiment.build_batches(args, data, 2, part)
    expected = loader.BatchLoader(
        data, batch_size=6, seed=5, replica=2, replicas=3, frac=0.5, augment=True, part=part or (0, 1)
    )
    for _ in range(8):
        inputs, targets = next(batches)
        wanted, labels = next(expected)
        assert torch.equal(inputs, wanted) and torch.equal(targets, labels)
        assert batches.dropout_seed() == expected.dropout_seed()
        assert rows <= len(targets) <= rows + 1


def test_hyperparameters_match_the_optimizers_keywords():
    line = "--lr 0.3 --momentum 0.4 --weight-decay 0.5 -L 6 --gamma 0.7 --rho 0.8 --alpha 0.9 --outer-lr-scale 11"
    given = experiment.hyperparameters(resolved(f"{line} --outer-momentum 0.12"), 13)
    expected = dict(
        lr=0.3, momentum=0.4, weight_decay=0.5, sync_every=6, gamma=0.7, rho=0.8, alpha=0.9, outer_lr_scale=11
    )
    assert given == expected | dict(outer_momentum=0.12, batches_per_epoch=13)
    taken = inspect.signature(ParleBase.__init__).parameters.values()
    assert given.keys() == {parameter.name for parameter in taken if parameter.kind == parameter.KEYWORD_ONLY}


def test_both_classes_accept_every_preset(comm):
    for method in ("parle", "entropy-sgd", "elastic-sgd", "sgd"):
        settings = experiment.hyperparameters(resolved(f"--method {method}"), 12)
        parameters = [[torch.nn.Parameter(torch.ones(3))] for _ in range(3)]
        here, there = parle_gpu.Parle(parameters[:2], **settings), parle_mpi.Parle(parameters[2], comm, **settings)
        for name, value in settings.items():
            assert {group[name] for group in (*here.param_groups, *there.param_groups)} == {value}


# The report


def test_out_names_the_output_directory(folder):
    report = experiment.open_logger(resolved("-d digits --out a/b"), None)
    assert (logger.folder, logger.label) == (Path("a/b"), "lenet on digits")
    assert [path.name for path in (folder / "a" / "b").iterdir()] == ["log.jsonl"]
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda: (Path("out").mkdir(), Path("out/log.jsonl").write_text("precious")),
        lambda: Path("out").write_text("a file"),
    ],
    ids=["another run", "a file"],
)
def test_unusable_out_is_a_mistake_and_changes_nothing(spoil, folder):
    spoil()
    before = {path: path.read_text() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(cli.UsageError, match=r"--out\b.*out"):
        experiment.open_logger(resolved("--out out"), None)
    assert {path: path.read_text() for path in folder.rglob("*") if path.is_file()} == before


def test_runs_started_in_the_same_second_do_not_collide(monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda format: format.replace("%Y%m%d-%H%M%S", "20260102-030405"))
    args = resolved("-m allcnn -d digits")
    folders = [experiment.open_logger(args, None).folder for _ in range(3)]
    name = "20260102-030405-allcnn-digits"
    assert folders == [Path("runs") / name, Path("runs") / f"{name}-2", Path("runs") / f"{name}-3"]
    for number in range(4, 100):
        assert experiment.open_logger(args, None).folder == Path("runs") / f"{name}-{number}"
    with pytest.raises(cli.UsageError, match="--out"):
        experiment.open_logger(args, None)


def test_unusable_runs_directory_is_a_mistake():
    Path("runs").write_text("a file")
    with pytest.raises(cli.UsageError, match="--out"):
        experiment.open_logger(resolved(), None)


# The run


COMMAND = "python this.py"


@pytest.fixture
def small_network(monkeypatch):
    monkeypatch.setattr(models, "build", tiny)


def parts(line="-d digits -n 2 -b 8 -L 2 -B 0.5 --eval-every 2"):
    args, data = resolved(line), dataset()
    replicas = {
        number: (experiment.build_model(args, data), experiment.build_batches(args, data, number))
        for number in range(2)
    }
    settings = experiment.hyperparameters(args, replicas[0][1].per_epoch)
    return args, data, parle_gpu.Parle([model.parameters() for model, _ in replicas.values()], **settings), replicas


class Report:
    """Keeps the events, and the master as it was when it was saved. Calls `then` with each event."""

    folder, log_bytes = Path("run"), 1234

    def __init__(self, then=lambda event: None):
        self.told, self.then = [], then

    def __call__(self, event):
        self.told.append(json.loads(json.dumps(event)))
        self.then(event)

    def save_master(self, model):
        self.told.append(deepcopy(model))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four rounds: what went into it, what it reported and its last master."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("finished"))
        patched.setattr(models, "build", tiny)
        torch.manual_seed(0)
        args, data, optimizer, replicas = parts()
        report = Report()
        ended = experiment.run(args, data, optimizer, replicas, report, None, COMMAND, devices=["a", "b"], mpi="none")
        assert ended is True
        averaged = evaluation.evaluate_running_stats(
            optimizer,
            [model for model, _ in replicas.values()],
            experiment.build_model(args, data),
            data,
            replicas=[0, 1],
        )
        last = experiment.build_model(args, data)
    optimizer.copy_master_to(last)
    return SimpleNamespace(args=args, data=data, optimizer=optimizer, told=logger.told, last=last, averaged=averaged)


def kinds(told):
    return ["master" if isinstance(item, torch.nn.Module) else item["event"] for item in told]


def test_master_is_saved_before_each_evaluation(finished):
    assert kinds(finished.told) == ["start", *["round", "master", "eval"] * 2, "end"]
    data = finished.data
    for master, evaluation in zip(finished.told[2:-1:3], finished.told[3:-1:3], strict=True):
        logits = evaluation.predict(master, data.test_images, data)
        error = 100 * (logits.argmax(1) != data.test_labels).double().mean()
        assert evaluation["master_error"] == pytest.approx(float(error))
        assert len(evaluation["replica_errors"]) == 2
    assert all(map(torch.equal, finished.last.parameters(), finished.told[-3].parameters()))


def test_only_the_last_evaluation_uses_running_statistics(finished):
    first, last = (told for told in finished.told if isinstance(told, dict) and told["event"] == "eval")
    assert last.keys() - first.keys() == finished.averaged.keys()
    assert len(finished.averaged) == 3 and finished.averaged.items() <= last.items()


def test_the_first_event_describes_the_run(finished):
    start, args = finished.told[0], finished.args
    assert start["arguments"] == vars(args) | dict(proc="proc")
    expected = dict(event="start", dataset="digits", origin="/raw", replicas=2, sync_every=2, images=64, rounds=4)
    assert start.items() >= (expected | dict(batches_per_epoch=8, devices=["a", "b"], mpi="none")).items()
    assert start["parameters"] == len(finished.optimizer.master)
    assert start["threads"] == torch.get_num_threads()
    assert {"time", "command", "python", "torch", "machine", "revision"} <= start.keys()


@pytest.mark.usefixtures("small_network")
def test_training_without_a_report_is_identical(finished, folder):
    args, data, silent, replicas = parts()
    torch.manual_seed(7)
    assert experiment.run(args, data, silent, replicas, None, None, COMMAND, devices=[]) is True
    assert silent.rounds == finished.optimizer.rounds == 4
    assert torch.equal(silent.master, finished.optimizer.master)
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize(("every", "kept"), [("", [8, 12]), ("--checkpoint-every 3", [9, 12])])
def test_checkpoints_are_in_the_output_directory(every, kept, folder):
    args, data, optimizer, replicas = parts(f"-d digits -n 2 -b 8 -L 2 -B 1.5 {every}")
    experiment.run(args, data, optimizer, replicas, Report(), None, COMMAND, devices=[])
    paths = sorted((folder / "run" / "checkpoints").iterdir())
    assert [path.name for path in paths] == [f"{rounds:08}-0000" for rounds in kept]
    manifest = checkpoint.read_manifest(paths[-1])
    assert manifest["arguments"] == vars(args) | dict(proc="proc")
    assert (manifest["log_bytes"], manifest["replicas"]) == (1234, 2)
    assert manifest["progress"]["images"] == 12 * 2 * 8 * 2


@pytest.mark.usefixtures("small_network")
def test_failed_checkpoint_is_reported(folder):
    (folder / "run").mkdir()
    (folder / "run" / "checkpoints").write_text("a file")
    args, data, optimizer, replicas = parts()
    report = Report()
    assert experiment.run(args, data, optimizer, replicas, report, None, COMMAND, devices=[]) is True
    assert [told["event"] for told in logger.told if isinstance(told, dict)][-2:] == ["checkpoint", "end"]
    assert logger.told[-2]["round"] == 4 and "checkpoints" in logger.told[-2]["error"]


@pytest.mark.usefixtures("small_network")
def test_interrupted_run_reports_the_resume_command(folder):
    args, data, optimizer, replicas = parts("-d digits -n 2 -b 8 -L 2 -B 5 --eval-every 2")
    report = Report(lambda event: event["event"] == "round" and os.kill(os.getpid(), signal.SIGTERM))
    assert experiment.run(args, data, optimizer, replicas, report, None, COMMAND, devices=[]) is False
    told = kinds(logger.told)
    assert told[:2] == ["start", "round"] and told[-1] == "stop" and "end" not in told
    assert logger.told[-1] == {"event": "stop", "round": optimizer.rounds_done, "command": f"{COMMAND} --resume run"}
    assert len(checkpoint.list_checkpoints(folder / "run" / "checkpoints")) == 1


@pytest.mark.usefixtures("small_network")
def test_arguments_reach_training_and_evaluation(monkeypatch):
    arrived = {}
    args, data, optimizer, replicas = parts(
        "-d digits -n 2 -b 8 -B 3 --lr-drops 1 2 --lr-decay 0.3 --amp bf16 --checkpoint-every 7"
    )
    team, world = distributed.Group(1, 2), distributed.Group(3, 4)

    def train(*given, **named):
        arrived.update(train=(given, named))
        return iter(())

    def evaluate(*given, **named):
        arrived.update(evaluate=(given, named))
        return {}

    monkeypatch.setattr(engine, "train", train)
    monkeypatch.setattr(engine, "evaluate", evaluate)
    there = {number + 4: pair for number, pair in replicas.items()}
    experiment.run(args, data, optimizer, there, None, None, COMMAND, team=team, world=world)
    (networks, sources, taken, test), named = arrived["train"]
    assert [(network, source) for network, source in zip(networks, sources, strict=True)] == list(replicas.values())
    assert taken is optimizer
    asked, save = named.pop("asked"), named.pop("save")
    assert (asked.save, asked.stop, callable(save)) == (False, False, True)
    expected = dict(epochs=3, lr_drops=[1, 2], lr_decay=0.3, eval_every=None, checkpoint_every=7)
    assert named == expected | dict(progress=training.TrainState(), amp=True, team=team, world=world)
    test()
    (taken, model, tested), named = arrived["evaluate"]
    assert taken is optimizer and tested is data
    assert model not in networks
    assert named == dict(batch_size=8, replicas=[4, 5], team=team, world=world)
