"""One run, from arguments to events: data, replicas, output directory, log and checkpoints."""

import inspect
import json
import os
import signal
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import pytest
import torch

import loader
import models
import parle_gpu
import parle_mpi
from parle import checkpoint, cli, evaluation, experiment, training
from parle.distributed import Groups
from parle.optimizer import ParleBase
from tests.test_checkpoint import tiny
from tests.toy import Member

pytestmark = pytest.mark.usefixtures("no_launcher")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Run the test in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(line=""):
    return cli.build_parser("parle_gpu.py", "Parle.").parse_args(line.split())


def resolved(line="-d digits"):
    return cli.apply_defaults(parsed(line), None)


def dataset(train=64, test=20):
    random = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (train + test, 8, 8, 1), generator=random, dtype=torch.uint8)
    labels = torch.arange(train + test) % 10
    arrays = (images[:train], labels[:train], images[train:], labels[train:])
    return loader.Dataset("digits", *arrays, torch.tensor([128.0]), torch.tensor([70.0]), 10, "/raw")


class Loader:
    """Loads the data sets that are available; fails with `error` for any other. Records its calls."""

    def __init__(self, *available, error=None):
        self.available, self.error, self.calls = available, error or loader.DownloadError("no network"), []

    def __call__(self, args):
        self.calls.append(args)
        if args.dataset not in self.available:
            raise self.error
        return f"the images of {args.dataset}"


def load_data(line, load, num_ranks=None, is_first_rank=True):
    given = parsed(line)
    args, before = cli.complete(given, num_ranks), deepcopy(given)
    try:
        return experiment.load_data(given, args, num_ranks=num_ranks, load=load, is_first_rank=is_first_rank)
    finally:
        assert given == before


# Data


@pytest.mark.parametrize(("line", "name"), [("", "mnist"), ("-d svhn", "svhn"), ("-m allcnn", "cifar10")])
def test_the_named_or_default_data_set_is_loaded(line, name, capsys):
    load = Loader(name, "digits")
    args, data = load_data(line, load, num_ranks=6)
    assert (args.dataset, data, len(load.calls)) == (name, f"the images of {name}", 1)
    assert args == cli.complete(parsed(line), 6)
    assert args.replicas == 6
    assert tuple(capsys.readouterr()) == ("", "")


@pytest.mark.parametrize("first", [True, False])
def test_default_data_fall_back_to_digits_without_network(first, capsys):
    args, data = load_data("-m allcnn", Loader("digits"), num_ranks=4, is_first_rank=first)
    assert data == "the images of digits"
    assert args == cli.complete(parsed("-m allcnn -d digits"), 4)
    assert (args.replicas, args.augment) == (4, False)  # augmentation is on for CIFAR
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
    load = Loader("digits", error=error)
    with pytest.raises(type(error)) as caught:
        load_data(line, load)
    assert caught.value is error
    assert len(load.calls) == 1
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


@pytest.mark.parametrize(("shard", "rows"), [(None, 6), ((0, 2), 3), ((1, 4), 1)])
def test_replica_has_the_batches_of_the_arguments(shard, rows):
    args, data = resolved("-d digits -b 6 -s 5 -n 3 --frac 0.5 --augment"), dataset()
    number, network, batches = experiment.build_replica(args, data, 2, *([] if shard is None else [shard]))
    initial = experiment.build_model(args, data)
    assert number == 2
    assert all(map(torch.equal, network.state_dict().values(), initial.state_dict().values()))
    expected = loader.BatchLoader(
        data, batch_size=6, seed=5, replica=2, replicas=3, frac=0.5, augment=True, shard=shard or (0, 1)
    )
    for _ in range(8):
        inputs, targets = next(batches)
        wanted, labels = next(expected)
        assert torch.equal(inputs, wanted) and torch.equal(targets, labels)
        assert batches.dropout_seed() == expected.dropout_seed()
        assert rows <= len(targets) <= rows + 1


def test_hyperparameters_match_the_optimizers_keywords():
    line = "--lr 0.3 --momentum 0.4 --weight-decay 0.5 -L 6 --gamma 0.7 --rho 0.8 --alpha 0.9 --outer-lr-scale 11"
    given = experiment.hyperparameters(resolved(f"{line} --outer-momentum 0.12 --master-average 0.13"), 13)
    expected = dict(
        lr=0.3, momentum=0.4, weight_decay=0.5, sync_every=6, gamma=0.7, rho=0.8, alpha=0.9, outer_lr_scale=11
    )
    assert given == expected | dict(outer_momentum=0.12, master_average=0.13, batches_per_epoch=13)
    taken = inspect.signature(ParleBase.__init__).parameters.values()
    names = {parameter.name for parameter in taken if parameter.kind == parameter.KEYWORD_ONLY}
    assert given.keys() == names - {"inner"}  # which is a function


def test_both_classes_accept_every_preset(comm):
    for method in ("parle", "entropy-sgd", "elastic-sgd", "sgd"):
        settings = experiment.hyperparameters(resolved(f"--method {method}"), 12)
        parameters = [[torch.nn.Parameter(torch.ones(3))] for _ in range(3)]
        here, there = parle_gpu.Parle(parameters[:2], **settings), parle_mpi.Parle(parameters[2], comm, **settings)
        for name, value in settings.items():
            assert {group[name] for group in (*here.param_groups, *there.param_groups)} == {value}


# The output directory


def test_out_names_the_output_directory(folder):
    assert experiment.open_logger(resolved("-d digits --out a/b"), None).folder == Path("a/b")
    assert [path.name for path in (folder / "a" / "b").iterdir()] == ["log.jsonl"]
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "prepare",
    [
        lambda: (Path("out").mkdir(), Path("out/log.jsonl").write_text("precious")),
        lambda: Path("out").write_text("a file"),
    ],
    ids=["another run", "a file"],
)
def test_unusable_out_is_an_error_and_changes_nothing(prepare, folder):
    prepare()
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


def test_unusable_runs_directory_is_an_error():
    Path("runs").write_text("a file")
    with pytest.raises(cli.UsageError, match="--out"):
        experiment.open_logger(resolved(), None)


# The run


COMMAND = "python this.py"


@pytest.fixture
def small_network(monkeypatch):
    monkeypatch.setattr(models, "build", tiny)


def build_experiment(line="-d digits -n 2 -b 8 -L 2 -B 0.5 --eval-every 2"):
    args, data = resolved(line), dataset()
    replicas = [experiment.build_replica(args, data, number) for number in range(2)]
    settings = experiment.hyperparameters(args, replicas[0].batches.per_epoch)
    optimizer = parle_gpu.Parle([replica.network.parameters() for replica in replicas], **settings)
    return experiment.Experiment(args, data, optimizer, replicas)


class RecordingLogger:
    """Records the events and the masters that are saved. Calls `then` with each event."""

    folder, log_bytes = Path("run"), 1234

    def __init__(self, then=lambda event: None):
        self.record, self.then, self.lines = [], then, []

    def __call__(self, event):
        self.record.append(json.loads(json.dumps(event)))
        self.then(event)

    def save_master(self, model):
        self.record.append(deepcopy(model))

    def print_line(self, text):
        self.lines.append(text)

    @property
    def kinds(self):
        return ["master" if isinstance(item, torch.nn.Module) else item["event"] for item in self.record]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a run of four rounds: what went into it, its logger and its last master."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("finished"))
        patched.setattr(models, "build", tiny)
        torch.manual_seed(0)
        trial, logger = build_experiment(), RecordingLogger()
        assert trial.run(logger, None, COMMAND, devices=["a", "b"], mpi="none") is True
        running_stats = evaluation.evaluate_running_stats(
            trial.optimizer, experiment.build_model(trial.args, trial.data), trial.data, networks=trial.networks
        )
        last = experiment.build_model(trial.args, trial.data)
    trial.optimizer.copy_master_to(last)
    return SimpleNamespace(trial=trial, logger=logger, last=last, running_stats=running_stats)


def test_master_is_saved_before_each_evaluation(finished):
    record, data = finished.logger.record, finished.trial.data
    assert finished.logger.kinds == ["start", *["round", "master", "eval"] * 2, "finished"]
    for master, event in zip(record[2:-1:3], record[3:-1:3], strict=True):
        logits = evaluation.predict(master, data.test_images, data)
        error = 100 * (logits.argmax(1) != data.test_labels).double().mean()
        assert event["master_error"] == pytest.approx(float(error))
        assert len(event["replica_errors"]) == 2
    assert all(map(torch.equal, finished.last.parameters(), record[-3].parameters()))


def test_only_the_last_evaluation_has_running_statistics(finished):
    first, last = (finished.logger.record[index] for index in (3, 6))
    assert last.keys() - first.keys() == finished.running_stats.keys()
    assert len(finished.running_stats) == 3 and finished.running_stats.items() <= last.items()


def test_the_first_event_describes_the_run(finished):
    start, trial = finished.logger.record[0], finished.trial
    assert start["arguments"] == vars(trial.args) | dict(proc=ANY)
    assert Path(start["arguments"]["proc"]).is_absolute()
    expected = dict(event="start", log_version=2, dataset="digits", source_dir="/raw", num_replicas=2, sync_every=2)
    expected |= dict(num_train_images=64, num_rounds=4, batches_per_epoch=8, devices=["a", "b"], mpi="none")
    assert start.items() >= expected.items()
    assert start["num_parameters"] == len(trial.optimizer.master)
    assert start["threads_per_rank"] == torch.get_num_threads()
    assert {"time", "command", "python", "torch", "machine", "revision"} <= start.keys()


@pytest.mark.usefixtures("small_network")
def test_training_without_a_logger_is_identical(finished, folder):
    silent = build_experiment()
    torch.manual_seed(7)
    assert silent.run(None, None, COMMAND, devices=[]) is True
    assert silent.optimizer.rounds_done == finished.trial.optimizer.rounds_done == 4
    assert torch.equal(silent.optimizer.master, finished.trial.optimizer.master)
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize(("every", "kept"), [("", [8, 12]), ("--checkpoint-every 3", [9, 12])])
def test_checkpoints_are_in_the_output_directory(every, kept, folder):
    trial = build_experiment(f"-d digits -n 2 -b 8 -L 2 -B 1.5 {every}")
    trial.run(RecordingLogger(), None, COMMAND, devices=[])
    paths = sorted((folder / "run" / "checkpoints").iterdir())
    assert [path.name for path in paths] == [f"{rounds:08}-0000" for rounds in kept]
    manifest = checkpoint.read_manifest(paths[-1])
    assert manifest["arguments"] == vars(trial.args) | dict(proc=str(folder / "proc"))
    assert (manifest["log_bytes"], manifest["num_replicas"]) == (1234, 2)
    assert manifest["train_state"]["images_seen"] == 12 * 2 * 8 * 2


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("small_network")
def test_warnings_are_lines_of_the_first_rank(capsys):
    for logger in (RecordingLogger(), None):
        trial = build_experiment("-d digits -n 2 -b 8 -L 2 -B 0.5 --outer-lr-scale 30")
        trial.run(logger, None, COMMAND, devices=[])
        if logger:
            (line,) = logger.lines
            assert line.startswith("WARNING: ") and "diverge" in line
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("small_network")
def test_failed_checkpoint_is_logged(folder):
    (folder / "run").mkdir()
    (folder / "run" / "checkpoints").write_text("a file")
    logger = RecordingLogger()
    assert build_experiment().run(logger, None, COMMAND, devices=[]) is True
    assert logger.kinds[-2:] == ["checkpoint_failed", "finished"]
    assert logger.record[-2]["round"] == 4 and "checkpoints" in logger.record[-2]["message"]


@pytest.mark.usefixtures("small_network")
def test_interrupted_run_logs_the_resume_command(folder):
    trial = build_experiment("-d digits -n 2 -b 8 -L 2 -B 5 --eval-every 2")
    logger = RecordingLogger(lambda event: event["event"] == "round" and os.kill(os.getpid(), signal.SIGTERM))
    assert trial.run(logger, None, COMMAND, devices=[]) is False
    assert logger.kinds[:2] == ["start", "round"] and "finished" not in logger.kinds
    interrupted = {"event": "interrupted", "round": trial.optimizer.rounds_done}
    assert logger.record[-1] == interrupted | {"resume_command": f"{COMMAND} --resume run"}
    assert len(checkpoint.list_checkpoints(folder / "run" / "checkpoints")) == 1


@pytest.mark.usefixtures("small_network")
def test_arguments_reach_training_and_evaluation(monkeypatch):
    calls = {}
    trial = build_experiment("-d digits -n 2 -b 8 -B 3 --lr-drops 1 2 --lr-decay 0.3 --amp bf16 --checkpoint-every 7")
    trial.replicas = [replica._replace(number=replica.number + 4) for replica in trial.replicas]
    trial.groups = Groups(replica=Member(1, 2), world=Member(3, 4))

    def train(*positional, **named):
        calls.update(train=(positional, named))
        return iter(())

    def evaluate(*positional, **named):
        calls.update(evaluate=(positional, named))
        return {}

    monkeypatch.setattr(experiment, "train", train)
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    trial.run(None, None, COMMAND)
    (replicas, optimizer, schedule), named = calls["train"]
    assert replicas == trial.replicas and optimizer is trial.optimizer
    assert schedule == training.Schedule(epochs=3, lr_drops=[1, 2], lr_decay=0.3, eval_every=None, checkpoint_every=7)
    request, save, test = (named.pop(name) for name in ("stop_request", "save", "evaluate"))
    assert (request.save, request.stop, callable(save)) == (False, False, True)
    assert named == dict(state=training.TrainState(), amp=True, groups=trial.groups)
    test()
    (optimizer, model, data), named = calls["evaluate"]
    assert optimizer is trial.optimizer and data is trial.data
    assert all(model is not network for network in trial.networks.values())
    assert named == dict(batch_size=8, replicas=[4, 5], groups=trial.groups)
