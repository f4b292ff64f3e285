import functools
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import models
from loader import DATASETS
from parle import algorithm, checkpoint, cli, launcher
from parle.distributed import Groups
from parle_gpu import Parle

pytestmark = pytest.mark.usefixtures("no_launcher")

MODELS = {
    "lenet": dict(dataset="mnist", epochs=2, lr_drops=[1], weight_decay=0, dropout=0.25, augment=False),
    "allcnn": dict(dataset="cifar10", epochs=10, lr_drops=[2, 4, 6], weight_decay=1e-3, dropout=0.5, augment=True),
    "wrn-28-10": dict(dataset="cifar10", epochs=5, lr_drops=[1, 2, 3], weight_decay=5e-4, dropout=0.25, augment=True),
    "wrn-16-4": dict(dataset="svhn", epochs=5, lr_drops=[1, 2, 3], weight_decay=5e-4, dropout=0.4, augment=False),
}
METHODS = {
    "parle": dict(replicas=3, sync_every=25, gamma=0.01, rho=0.01),
    "entropy-sgd": dict(replicas=1, sync_every=25, gamma=0.01, rho=0),
    "elastic-sgd": dict(replicas=3, sync_every=1, gamma=0, rho=1 / 3),
    "sgd": dict(replicas=1, sync_every=1, gamma=0, rho=0),
}
ALWAYS = dict(
    **dict(
        seed=42,
        alpha=0.75,
        outer_lr_scale=1,
        outer_momentum=0.9,
        batch_size=128,
        lr=0.1,
        lr_decay=0.2,
        momentum=0.9,
        master_average=0,
    ),
    **dict(zca=False, frac=1, data=None, proc=Path("proc"), out=None, eval_every=None, device="auto", amp="off"),
    **dict(checkpoint_every=None, resume=None, on_nan="restart", timeout=1800, doctor=False),
)
FLAG = r"(?<![\w-])--?[A-Za-z][\w-]*"
FLAGS = re.findall(
    FLAG,
    """-h -m --model -d --dataset -n --replicas --method -L --sync-every --gamma --rho --alpha --outer-lr-scale
    --outer-momentum --master-average --lr --lr-drops --lr-decay --momentum --weight-decay --dropout -b --batch-size
    -B --epochs --augment --no-augment --zca --frac --data --proc --out -s --seed --device --amp --eval-every
    --checkpoint-every --resume --on-nan --timeout --doctor""",
)

parser = functools.cache(lambda: cli.build_parser("parle_mpi.py", "Parle."))


def parse(line, num_ranks=None):
    return cli.complete(parser().parse_args(line.split() if isinstance(line, str) else line), num_ranks)


def printed_error(capsys, action, *arguments):
    """Return the one line that is printed on stderr."""
    with pytest.raises(cli.UsageError) as caught:
        action(*arguments)
    cli.print_error("parle_mpi.py", caught.value)
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err[-1:]) == ("", 1, "\n")
    assert err.startswith("parle_mpi.py: error: ")
    return err


# Defaults


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_defaults(method, model):
    expected = dict(method=method, model=model) | ALWAYS | METHODS[method] | MODELS[model]
    if expected["sync_every"] == 1:  # the same number of steps as with 25
        expected["epochs"] *= 25
        expected["lr_drops"] = [25 * drop for drop in expected["lr_drops"]]
    assert vars(parse(f"--method {method} -m {model}")) == expected


def test_default_is_parle_with_lenet():
    assert parse("") == parse("--method parle -m lenet")


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--method sgd -n 4", "replicas", 4),
        ("--method sgd -L 10", "sync_every", 10),
        ("--method sgd --gamma 0.2", "gamma", 0.2),
        ("--method entropy-sgd -n 2", "replicas", 2),
        ("--method entropy-sgd --rho 0.3", "rho", 0.3),
        ("--method entropy-sgd --gamma 0", "gamma", 0),
        ("--method elastic-sgd --rho 0.5", "rho", 0.5),
        ("--method elastic-sgd --rho 0", "rho", 0),
        ("--method elastic-sgd -L 5", "sync_every", 5),
        ("--method parle --rho 0", "rho", 0),
        ("-m allcnn -d cifar100", "dataset", "cifar100"),
        ("-m allcnn --dropout 0", "dropout", 0),
        ("-m allcnn --weight-decay 0", "weight_decay", 0),
        ("-m allcnn -B 0.1", "epochs", 0.1),
        ("--lr-drops 0.5 1e1 3", "lr_drops", [0.5, 10, 3]),
        ("--lr-drops", "lr_drops", []),
        ("-m allcnn --lr-drops -n 2", "lr_drops", []),
        ("--lr 0", "lr", 0),
        ("--momentum 0", "momentum", 0),
        ("--proc /tmp/p", "proc", Path("/tmp/p")),
        ("--out there", "out", Path("there")),
        ("--data .", "data", Path(".")),
        ("--amp bf16", "amp", "bf16"),
        ("--on-nan stop", "on_nan", "stop"),
        ("--zca", "zca", True),
    ],
)
def test_given_flag_overrides_defaults(line, name, value):
    assert getattr(parse(line), name) == value


@pytest.mark.parametrize(
    ("line", "momentum"),
    [("", 0.9), ("--momentum 0.5", 0.5), ("--momentum 0.5 --outer-momentum 0", 0), ("--outer-momentum 0.2", 0.2)],
)
def test_outer_momentum_defaults_to_momentum(line, momentum):
    assert parse(line).outer_momentum == momentum


@pytest.mark.parametrize(
    ("line", "augment"),
    [
        *((f"-d {name}", name.startswith("cifar")) for name in DATASETS),
        ("-m allcnn -d mnist", False),
        ("-d mnist --augment", True),
        ("-d cifar10 --no-augment", False),
    ],
)
def test_only_cifar_is_augmented_by_default(line, augment):
    assert parse(line).augment is augment


@pytest.mark.parametrize(
    ("line", "replicas"),
    [("", 12), ("-n 3", 3), ("-n 12", 12), ("--method elastic-sgd", 12), ("--method sgd", 1), ("--method sgd -n 4", 4)],
)
def test_number_of_replicas_on_12_ranks(line, replicas):
    assert parse(line, 12).replicas == replicas


@pytest.mark.parametrize(("line", "num_ranks"), [("", None), ("-n 6", None), ("", 12), ("-n 4", 12)])
def test_elastic_sgd_defaults_to_rho_of_one_over_n(line, num_ranks):
    args = parse(f"--method elastic-sgd {line}", num_ranks)
    assert args.rho * args.replicas == pytest.approx(1)
    assert (args.sync_every, args.gamma) == (1, 0)


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("-m allcnn", "--model allcnn"),
        ("-d svhn", "--dataset svhn"),
        ("-s 3", "--seed 3"),
        ("-n 2", "--replicas 2"),
        ("-L 4", "--sync-every 4"),
        ("-b 64", "--batch-size 64"),
        ("-B 0.5", "--epochs 0.5"),
    ],
)
def test_short_flags_equal_long_flags(short, long):
    assert parse(short) == parse(long) != parse("")


def test_apply_defaults_leaves_its_argument_unchanged():
    given = parser().parse_args(["--method", "elastic-sgd"])
    before = dict(vars(given))
    cli.apply_defaults(given, 12)
    assert vars(given) == before
    assert given.dataset is given.replicas is given.rho is None


# Wrong values: for each flag the limits, which are accepted, and values that are rejected in addition to NOT_A_NUMBER

NOT_A_NUMBER = ["x", "nan", "inf", "1e400", "-1", "", "1,5", "½", "0x1", "1\0", "-1e-3", "1\n2", "1/n"]
NOT_AN_INTEGER = ["1.5", "1e3", str(-(10**30)), "1" * 5000]
NONNEGATIVE = (["0", "0.01", "1e6"], ["1000001", "1e39"])
BELOW_ONE = (["0", "0.999"], ["1", "0.99999999999999999"])
NUMBERS = {
    "-s/--seed": (["0", str(2**63 - 1)], [str(2**63), "1.5"]),
    "-n/--replicas": (["1", "10000"], ["0", "10001", str(10**30), *NOT_AN_INTEGER]),
    "-L/--sync-every": (["1", str(10**9)], ["0", str(10**9 + 1), "Auto", *NOT_AN_INTEGER]),
    "--gamma": NONNEGATIVE,
    "--rho": NONNEGATIVE,
    "--alpha": BELOW_ONE,
    "--outer-lr-scale": NONNEGATIVE,
    "--outer-momentum": BELOW_ONE,
    "--master-average": BELOW_ONE,
    "-b/--batch-size": (["2", "1000"], ["0", "1", *NOT_AN_INTEGER]),
    "-B/--epochs": (["1e-9", "1e9"], ["0", "1e308"]),
    "--lr": NONNEGATIVE,
    "--lr-drops": (["1e-9", "1e9"], ["0", "1e308"]),
    "--lr-decay": (["1e-9", "2"], ["0"]),
    "--momentum": BELOW_ONE,
    "--weight-decay": NONNEGATIVE,
    "--dropout": BELOW_ONE,
    "--frac": (["1e-9", "1"], ["0", "1.0000001"]),
    "--timeout": (["0.1", "1e9"], ["0"]),
    "--eval-every": (["1", "1000"], ["0", *NOT_AN_INTEGER]),
    "--checkpoint-every": (["1", "1000"], ["0", *NOT_AN_INTEGER]),
}
NAMES = {
    "-m/--model": models.RECIPES,
    "-d/--dataset": DATASETS,
    "--method": algorithm.PRESETS,
    "--on-nan": ("restart", "stop"),
    "--amp": ("off", "bf16"),
}
DIRECTORIES = ("--data", "--proc", "--out", "--resume")


@pytest.mark.parametrize("flag", NUMBERS)
def test_number_outside_limits_is_reported(flag, capsys):
    accepted, rejected = NUMBERS[flag]
    long = flag.split("/")[-1]
    for value in accepted:
        number = getattr(parse([f"{long}={value}"]), long[2:].replace("-", "_"))
        assert number == ([float(value)] if flag == "--lr-drops" else type(number)(value))
    for value in [*rejected, *NOT_A_NUMBER]:
        line = printed_error(capsys, parse, [f"{long}={value}"])
        assert flag in line and " ".join(value.split()) in line


@pytest.mark.parametrize("flag", NAMES)
def test_unknown_name_is_reported_with_the_choices(flag, capsys):
    for value in ("", "x", "Lenet", "lénet", "lenet\n", "lenet\0", "off,", "None", "%s", "{}", "-"):
        line = printed_error(capsys, parse, [f"{flag.split('/')[-1]}={value}"])
        assert all(word in line for word in [flag, value.strip(), *NAMES[flag]])


def test_flag_without_its_value_is_reported(capsys):
    for flag in [*NUMBERS, *NAMES, *DIRECTORIES, "--device"]:
        if flag not in ("--lr-drops", "--resume"):
            assert flag in printed_error(capsys, parse, [flag.split("/")[0]])


@pytest.mark.parametrize("flag", DIRECTORIES)
def test_directory_needs_a_valid_name(flag, capsys):
    for value in ("", "a\0b"):
        assert flag in printed_error(capsys, parse, [f"{flag}={value}"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--replica 3", ["--replica", "--replicas"]),
        ("-lr 0.1", ["-lr", "--lr"]),
        ("--lr_drops 1", ["--lr_drops", "--lr-drops"]),
        ("--Lr 1", ["--Lr", "--lr"]),
        ("--gama=0.0123456789", ["--gama", "--gamma"]),
        ("--batchsize 64", ["--batchsize", "--batch-size"]),
        ("–-lr 1", ["–-lr", "--lr"]),
        ("--no-zca", ["--no-zca"]),
        ("-q", ["-q", "-h"]),
        ([""], ["-h"]),
        (["a\nb"], ["a b", "-h"]),
        ("-n 3 cifar10", ["cifar10"]),
        ("-n 2 2", ["2"]),
        ("--zca yes", ["yes"]),
        ("--zca=yes", ["--zca", "yes"]),
        ("--augment=no", ["--augment", "no"]),
        ("--gamma -1e-3", ["--gamma"]),
        ("--lr-drops 1 2 three", ["--lr-drops", "three"]),
        ("-momentum 0.5", ["-m/--model", "omentum"]),
        ("-L auto --gamma 0", ["-L auto", "--gamma"]),
        ("-L auto --method sgd", ["-L auto", "--gamma"]),
        ("-L auto --method elastic-sgd", ["-L auto", "--gamma"]),
        ("-L auto --gamma 1e-320", ["-L auto", "--gamma"]),
        ("-L auto --gamma 1e-10 --lr 1", ["-L auto", "--gamma"]),
        ("--data /nonexistent", ["--data", "/nonexistent"]),
        (f"--data {__file__}", ["--data", __file__]),
        (f"--data {__file__}/below", ["--data", __file__]),
        (f"--data {'a' * 300}", ["--data", "a" * 300]),
        (["--data", "no/a\nb"], ["--data", "no/a b"]),
    ],
)
def test_wrong_command_line_is_reported_in_one_line(line, words, capsys):
    err = printed_error(capsys, parse, line)
    assert all(word in err for word in words)


@pytest.mark.parametrize(
    ("line", "suggested"), [("-m allcn", "allcnn"), ("--method parl-e", "parle"), ("-d sv", "svhn")]
)
def test_closest_name_is_suggested(line, suggested, capsys):
    words = re.findall(rf"(?<![\w.-]){suggested}\b(?!-)", printed_error(capsys, parse, line))
    assert len(words) == 2  # one of them is in the list of choices


def test_auto_sync_interval_is_accepted():
    assert parse("-L auto").sync_every == "auto"


@pytest.mark.parametrize(
    ("line", "num_ranks", "words"),
    [
        ("-n 5", 12, ["12", "-n 5", "1, 2, 3, 4, 6, 12"]),
        ("-n 12", 3, ["3", "-n 12", "1, 3"]),
        ("-n 3 -b 7", 12, ["-b 7", "4", "-b 8"]),
        ("--method sgd -b 23", 12, ["-b 23", "12", "-b 24"]),
    ],
)
def test_replicas_and_batch_must_fit_the_ranks(line, num_ranks, words, capsys):
    err = printed_error(capsys, parse, line, num_ranks)
    assert all(word in err for word in words)


@pytest.mark.parametrize(("line", "num_ranks"), [("-n 3 -b 8", 12), ("--method sgd -b 24", 12), ("-n 3 -b 2", 3)])
def test_two_images_per_rank_are_accepted(line, num_ranks):
    assert parse(line, num_ranks).batch_size == int(line.split()[-1])


@pytest.mark.parametrize("value", ["abc", "1.5", "0", "99999", "1025", "-1", " ", "x,4", "²", "1" * 5000])
def test_invalid_omp_num_threads_is_reported(value, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    line = printed_error(capsys, parse, "")
    assert "OMP_NUM_THREADS" in line and value.split(",")[0].strip() in line


@pytest.mark.parametrize("value", ["1", "1,1", " 1", "1024"])
def test_valid_omp_num_threads_is_accepted(value, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert parse("") == parse("--method parle")


# Resuming


def set_launcher(monkeypatch, num_ranks, by_parle=False):
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", str(num_ranks))
    if by_parle:
        monkeypatch.setenv(launcher.STATUS_DIR, "folder")


def parse_argv(monkeypatch, *argv, prog="parle_mpi.py"):
    monkeypatch.setattr(sys, "argv", [prog, *map(str, argv)])
    return cli.parse(cli.build_parser(prog, "Parle."))


@pytest.fixture
def save(tmp_path):
    """Return a function that saves a checkpoint of a run with a command line and returns its output directory."""

    def save(line):
        was = parse(line)
        networks = {number: nn.Linear(2, 1) for number in range(was.replicas)}
        optimizer = Parle([network.parameters() for network in networks.values()], lr=1, batches_per_epoch=1)
        arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(was).items()}
        metadata = dict(arguments=arguments | dict(program="parle_mpi.py"), data={}, train_state={}, log_bytes=0)
        checkpoint.save(tmp_path / checkpoint.FOLDER, optimizer, networks, metadata, Groups())
        return tmp_path

    return save


@pytest.fixture
def resume(save, monkeypatch):
    """Return a function that resumes a run of `line` with the arguments `more` and returns all its arguments."""
    monkeypatch.delenv(launcher.STATUS_DIR, raising=False)

    def resume(line, *more, num_ranks=None):
        return cli.apply_defaults(parse_argv(monkeypatch, "--resume", save(line), *more), num_ranks)

    return resume


ENTROPY, PARLE, ELASTIC = "--method entropy-sgd -n 2", "--method parle -n 3", "--method elastic-sgd -n 3"


@pytest.mark.parametrize(
    ("line", "more", "num_ranks", "by_parle", "replicas"),
    [
        (ENTROPY, "", None, False, 2),
        (ENTROPY, "", 2, True, 2),
        (ENTROPY, "", 1, False, 2),
        (PARLE, "", 3, True, 3),
        (PARLE, "", 5, False, 5),
        (PARLE, "-n 1", 5, False, 1),
        (PARLE, "-n 5", 5, True, 5),
        (PARLE, "-n 5", None, False, 5),
    ],
)
def test_resumed_run_has_the_replicas_of_the_launcher(line, more, num_ranks, by_parle, replicas, resume, monkeypatch):
    if num_ranks is not None:
        set_launcher(monkeypatch, num_ranks, by_parle)
    assert resume(line, *more.split(), num_ranks=num_ranks).replicas == replicas


@pytest.mark.parametrize(
    ("line", "more", "num_ranks", "rho"),
    [
        (f"{ELASTIC} --rho 0.1", "", None, 0.1),
        (f"{ELASTIC} --rho 0.1", "-n 5", None, 0.1),
        (f"{ELASTIC} --rho 0.1", "", 5, 0.1),
        (f"{ELASTIC} --rho 0.1", "--rho 0.3", None, 0.3),
        (f"{ELASTIC} --rho 0", "-n 5", None, 0),
        (ELASTIC, "", None, 1 / 3),
        (ELASTIC, "-n 5", None, 1 / 5),
        (ELASTIC, "", 5, 1 / 5),
        (ELASTIC, "-n 5 --rho 0.1", None, 0.1),
        ("--method parle -n 3 --rho 0.5", "-n 5", None, 0.5),
    ],
)
def test_resumed_run_keeps_given_rho_or_one_over_n(line, more, num_ranks, rho, resume, monkeypatch):
    if num_ranks is not None:
        set_launcher(monkeypatch, num_ranks)
    assert resume(line, *more.split(), num_ranks=num_ranks).rho == rho


def parse_restarted(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["parle_mpi.py", *map(str, argv)])
    return cli.parse(cli.build_parser("parle_mpi.py", "Parle."), restarted=True).resume


def test_ranks_that_torchrun_has_restarted_resume_their_own_run(save, monkeypatch, tmp_path):
    run, new = save(PARLE), tmp_path / "new"
    parse = functools.partial(parse_restarted, monkeypatch)
    checkpoints = run / "checkpoints"
    assert parse(*PARLE.split(), "--out", run) == checkpoints
    assert parse("--resume", run) == checkpoints
    assert parse("--resume", checkpoints / "00000000-0000") == checkpoints  # which no longer exists
    assert parse("--out", new, "--resume", run) == checkpoints  # nothing was saved in the new directory
    assert parse("--out", new) is None
    shutil.copytree(run, new)
    assert parse("--out", new, "--resume", run) == new / "checkpoints"


@pytest.mark.parametrize(
    ("line", "words"),
    [("", "--out DIR"), ("--out RUN --lr 0.3", "another run.*lr is"), ("--out EMPTY", "no checkpoint yet")],
)
def test_restarted_ranks_refuse_what_is_not_their_run(line, words, save, monkeypatch, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.jsonl").touch()
    line = line.replace("RUN", str(save(PARLE))).replace("EMPTY", str(tmp_path / "empty"))
    assert re.search(words, printed_error(capsys, parse_restarted, monkeypatch, *line.split()))


def test_resumed_arguments_name_the_current_program(save, monkeypatch):
    assert parse_argv(monkeypatch, "--resume", save(PARLE), prog="parle_gpu.py").program == "parle_gpu.py"
    assert parse_argv(monkeypatch, prog="parle_mpi.py").program == "parle_mpi.py"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("-m allcnn", ["lenet", "allcnn"]),
        ("--method sgd", ["parle", "sgd"]),
        ("-d digits", ["mnist", "digits"]),
        ("--zca", ["False", "True"]),
        ("-n 0", ["-n/--replicas", "0"]),
    ],
)
def test_run_is_not_resumed_as_another(more, words, save, monkeypatch, capsys):
    err = printed_error(capsys, parse_argv, monkeypatch, "--resume", save(PARLE), *more.split())
    assert all(word in err for word in words)


@pytest.mark.parametrize("flags", [["--resume"], ["--resume", "--out"]], ids=" ".join)
def test_path_without_checkpoint_is_not_resumed(flags, save, tmp_path, monkeypatch, capsys):
    run = save(PARLE)
    (replica, *_) = sorted(run.glob("checkpoints/*/replica-0.pt"))
    (tmp_path / "file").touch()
    for path in (
        *(tmp_path / "nowhere", tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("a" * 300)),
        *(tmp_path / "a\nb", Path("/dev/null/below"), run / "checkpoints", replica),
    ):
        line = printed_error(capsys, parse_argv, monkeypatch, *flags, path)
        assert "--resume" in line and " ".join(str(path).split()) in line
    assert "--resume" in printed_error(capsys, parse_argv, monkeypatch, "--resume")


# Devices


@pytest.mark.parametrize(
    "name",
    [
        *("nonsense", "", "meta", "cpu:x", "cpu:1", "cuda:-1", "cuda:99", f"cuda:{10**30}", "privateuseone", "xla"),
        *("cpu\n", "cpu\0", "прoцессор"),
    ],
)
def test_unavailable_device_is_reported(name, capsys):
    line = printed_error(capsys, cli.find_devices, name)
    assert f"--device {' '.join(name.split())}" in line and "cpu" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_reported_on_a_machine_without_it(capsys):
    assert "--device cuda" in printed_error(capsys, cli.find_devices, "cuda")


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_device_is_cpu_without_accelerator(name, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert cli.find_devices(name) == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        *((name, ["cuda:0", "cuda:1"]) for name in ("auto", "cuda")),
        *((name, [name]) for name in ("cuda:0", "cuda:1", "cpu")),
    ],
)
def test_numbered_device_is_one_and_a_kind_is_all(name, found, monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert cli.find_devices(name) == [torch.device(device) for device in found]
    for missing in ("cuda:2", "xpu"):
        line = printed_error(capsys, cli.find_devices, missing)
        assert f"--device {missing}" in line and "cuda:0, cuda:1, cpu" in line


def test_device_name_includes_the_model(monkeypatch):
    assert cli.device_name(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(
        torch, "get_device_module", lambda device: SimpleNamespace(get_device_name=lambda device: "Fast 9000")
    )
    assert cli.device_name(torch.device("cuda", 1)) == "cuda:1 (Fast 9000)"


# Output: only rank 0 prints


def test_empty_omp_num_threads_is_as_if_unset(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    empty = parse("")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert empty == parse("")


def test_error_that_cannot_be_printed_is_no_other_error(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        cli.print_error("parle_mpi.py", cli.UsageError("wrong"))


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as exit:
        parse("-h")
    out, err = capsys.readouterr()
    assert (exit.value.code, err) == (0, "")
    assert set(FLAGS) <= set(re.findall(FLAG, out))


@pytest.mark.parametrize(
    ("rank", "size"),
    [
        ("PMI_RANK", "PMI_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        ("PMIX_RANK", "ANY"),
    ],
)
def test_only_rank_0_prints_errors(rank, size, monkeypatch, capsys):
    monkeypatch.setenv(size, "3")
    monkeypatch.setenv(rank, "0")
    printed_error(capsys, parse, "-n 0")
    monkeypatch.setenv(rank, "1")
    with pytest.raises(cli.UsageError) as caught:
        parse("-n 0")
    cli.print_error("parle_mpi.py", caught.value)
    assert tuple(capsys.readouterr()) == ("", "")


def test_only_rank_0_prints_the_help(monkeypatch, capsys):
    monkeypatch.setenv("PMI_SIZE", "3")
    monkeypatch.setenv("PMI_RANK", "1")
    with pytest.raises(SystemExit) as exit:
        parse("-h")
    assert (exit.value.code, *capsys.readouterr()) == (0, "", "")


@pytest.fixture(scope="module")
def failed_start(python):
    """Run parle_mpi.py with an undecodable argument, then print which slow packages it has imported."""
    script = """
import sys, parle_mpi
import parle.experiment, parle.logger, parle.doctor
try:
    parle_mpi.main()
finally:
    imported = {name.partition(".")[0] for name in sys.modules}
    print(imported & {"torchvision", "sklearn", "scipy", "matplotlib", "mpi4py"})
"""
    return python("-c", script, "-m", "\udcff")


def test_parsing_imports_no_torchvision_sklearn_scipy_mpi(failed_start):
    assert failed_start.stdout == "set()\n"


def test_undecodable_argument_is_reported_in_one_line(failed_start):
    assert failed_start.returncode == 2
    assert failed_start.stderr.startswith("parle_mpi.py: error: ") and failed_start.stderr.count("\n") == 1
    assert all(word in failed_start.stderr for word in ("-m/--model", r"\udcff", "allcnn"))
