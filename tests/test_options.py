import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import engine
import experiment
import launch
import options
from loader import SOURCES
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
    **dict(seed=42, alpha=0.75, outer_step=1, outer_momentum=0.9, batch_size=128, lr=0.1, lr_decay=0.2, momentum=0.9),
    **dict(whiten=False, frac=1, data=None, proc=Path("proc"), out=None, eval_every=None, device="auto", amp="off"),
    **dict(checkpoint_every=None, resume=None, on_nan="restart", timeout=1800, doctor=False),
)
FLAG = r"(?<![\w-])--?[A-Za-z][\w-]*"
FLAGS = re.findall(
    FLAG,
    """-h -m --model -d --dataset -n --replicas --method -L --sync-every --gamma --rho --alpha --outer-step
    --outer-momentum --lr --lr-drops --lr-decay --momentum --weight-decay --dropout -b --batch-size -B --epochs
    --augment --no-augment --whiten --frac --data --proc --out -s --seed --device --amp --eval-every
    --checkpoint-every --resume --on-nan --timeout""",
)


def parse(line, size=None):
    parser = options.parser("parle_mpi.py", "Parle.")
    args = options.resolve(parser.parse_args(line.split()), size)
    options.check(args, size)
    return args


def complaint(capsys, action, *arguments):
    """What a user sees of a mistake: one line on stderr."""
    with pytest.raises(options.Mistake) as mistake:
        action(*arguments)
    options.tell("parle_mpi.py", mistake.value)
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err[-1:]) == ("", 1, "\n")
    assert err.startswith("parle_mpi.py: error: ")
    return err


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_defaults(method, model):
    expected = dict(method=method, model=model) | ALWAYS | METHODS[method] | MODELS[model]
    if expected["sync_every"] == 1:  # as many mini-batches as with 25
        expected["epochs"] *= 25
        expected["lr_drops"] = [25 * drop for drop in expected["lr_drops"]]
    assert vars(parse(f"--method {method} -m {model}")) == expected


def test_without_a_flag_parle_trains_lenet():
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
        ("--lr-decay 0.1", "lr_decay", 0.1),
        ("--lr 0", "lr", 0),
        ("--momentum 0", "momentum", 0),
        ("-L auto", "sync_every", "auto"),
        ("-L 1", "sync_every", 1),
        ("-b 2", "batch_size", 2),
        ("-s 0", "seed", 0),
        ("--alpha 0", "alpha", 0),
        ("--frac 0.5", "frac", 0.5),
        ("--outer-step 0.3", "outer_step", 0.3),
        ("--proc /tmp/p", "proc", Path("/tmp/p")),
        ("--out there", "out", Path("there")),
        ("--data .", "data", Path(".")),
        ("--eval-every 7", "eval_every", 7),
        ("--amp bf16", "amp", "bf16"),
        ("--whiten", "whiten", True),
    ],
)
def test_a_flag_wins_over_every_default(line, name, value):
    assert getattr(parse(line), name) == value


@pytest.mark.parametrize(
    ("line", "momentum"),
    [("", 0.9), ("--momentum 0.5", 0.5), ("--momentum 0.5 --outer-momentum 0", 0), ("--outer-momentum 0.2", 0.2)],
)
def test_outer_momentum_follows_momentum(line, momentum):
    assert parse(line).outer_momentum == momentum


@pytest.mark.parametrize(
    ("line", "augment"),
    [
        *((f"-d {name}", name.startswith("cifar")) for name in SOURCES),
        ("-m allcnn -d mnist", False),
        ("-d mnist --augment", True),
        ("-d cifar10 --no-augment", False),
    ],
)
def test_cifar_alone_is_augmented_unless_told(line, augment):
    assert parse(line).augment is augment


@pytest.mark.parametrize(
    ("line", "replicas"),
    [("", 12), ("-n 3", 3), ("-n 12", 12), ("--method elastic-sgd", 12), ("--method sgd", 1), ("--method sgd -n 4", 4)],
)
def test_replicas_of_a_launcher_with_12_ranks(line, replicas):
    assert parse(line, 12).replicas == replicas


@pytest.mark.parametrize(("line", "size"), [("", None), ("-n 6", None), ("", 12), ("-n 4", 12)])
def test_elastic_sgd_starts_at_rho_n_of_one(line, size):
    args = parse(f"--method elastic-sgd {line}", size)
    assert args.rho * args.replicas == pytest.approx(1)
    assert (args.sync_every, args.gamma) == (1, 0)


def launched(monkeypatch, size, started=False):
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", str(size))
    if started:
        monkeypatch.setenv(launch.STARTED, "folder")


@pytest.fixture
def resume(tmp_path, monkeypatch):
    """The arguments of a run that goes on from one with `line`, when `more` are given anew."""
    monkeypatch.delenv(launch.STARTED, raising=False)

    def resume(line, *more, size=None):
        was = parse(line)
        weights = [[torch.nn.Parameter(torch.zeros(2))] for _ in range(was.replicas)]
        optimizer = Parle(weights, lr=1, batches_per_epoch=1)
        facts = dict(arguments=experiment._plain(was) | dict(program="parle_mpi.py"), progress={}, log_bytes=0)
        numbers = list(range(was.replicas))
        checkpoint.save(tmp_path / checkpoint.FOLDER, optimizer, numbers, facts, engine.ALONE, engine.ALONE)
        monkeypatch.setattr(sys, "argv", ["parle_mpi.py", "--resume", str(tmp_path), *more])
        return options.resolve(options.parse(options.parser("parle_mpi.py", "Parle.")), size)

    return resume


ENTROPY, PARLE = "--method entropy-sgd -n 2", "--method parle -n 3"


@pytest.mark.parametrize(
    ("line", "more", "size", "started", "replicas"),
    [
        (ENTROPY, "", None, False, 2),
        (ENTROPY, "", 2, True, 2),
        (ENTROPY, "", 1, False, 2),
        (PARLE, "", None, False, 3),
        (PARLE, "", 3, True, 3),
        (PARLE, "", 1, False, 3),
        (PARLE, "", 5, False, 5),
        (PARLE, "-n 1", 5, False, 1),
        (PARLE, "-n 5", 5, True, 5),
        (PARLE, "-n 5", None, False, 5),
        ("--method sgd -n 3", "", 3, True, 3),
    ],
)
def test_a_run_that_goes_on_has_as_many_replicas_unless_a_launcher_has_other_ranks(
    line, more, size, started, replicas, resume, monkeypatch
):
    if size is not None:
        launched(monkeypatch, size, started)
    assert resume(line, *more.split(), size=size).replicas == replicas


ELASTIC = "--method elastic-sgd -n 3"


@pytest.mark.parametrize(
    ("line", "more", "size", "rho"),
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
def test_a_run_that_goes_on_keeps_the_rho_that_was_given_and_else_rho_n_of_one(
    line, more, size, rho, resume, monkeypatch
):
    if size is not None:
        launched(monkeypatch, size)
    assert resume(line, *more.split(), size=size).rho == rho


def test_the_program_is_the_one_that_runs_now(resume):
    assert resume(PARLE).program == "parle_mpi.py"
    sys.argv[0] = "parle_gpu.py"
    assert options.parse(options.parser("parle_gpu.py", "Parle.")).program == "parle_gpu.py"


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
def test_short_flags_are_long_ones(short, long):
    assert parse(short) == parse(long) != parse("")


def test_resolving_leaves_what_was_given_as_it_was():
    given = options.parser("parle_mpi.py", "Parle.").parse_args(["--method", "elastic-sgd"])
    before = dict(vars(given))
    options.resolve(given, 12)
    assert vars(given) == before
    assert given.dataset is given.replicas is given.rho is None


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("-n 0", "-n/--replicas: 0 is not a whole number of at least 1"),
        ("-n -1", "-n/--replicas: -1 is not"),
        ("-n 2.5", "-n/--replicas: 2.5 is not"),
        ("-n x", "-n/--replicas: x is not"),
        ("-n nan", "-n/--replicas: nan is not"),
        ("-n", "-n/--replicas"),
        ("-L -3", "-L/--sync-every: -3 is not"),
        ("-L 0", "-L/--sync-every: 0 is not"),
        ("-L 1.5", "-L/--sync-every: 1.5 is not"),
        ("-L Auto?", "-L/--sync-every: Auto? is not a whole number of at least 1 and up to 1e9, such as 25, or auto"),
        ("--gamma nan", "--gamma: nan is not"),
        ("--gamma inf", "--gamma: inf is not"),
        ("--gamma -1", "--gamma: -1 is not"),
        ("--gamma -1e-3", "--gamma"),
        ("--gamma small", "--gamma: small is not"),
        ("--rho nan", "--rho: nan is not"),
        ("--rho -0.5", "--rho: -0.5 is not"),
        ("--rho 1/n", "--rho: 1/n is not"),
        ("--alpha 1", "--alpha: 1 is not"),
        ("--alpha -0.1", "--alpha: -0.1 is not"),
        ("--alpha nan", "--alpha: nan is not"),
        ("--outer-step -1", "--outer-step: -1 is not"),
        ("--outer-step inf", "--outer-step: inf is not"),
        ("--outer-momentum 1", "--outer-momentum: 1 is not"),
        ("--frac 1.5", "--frac: 1.5 is not"),
        ("--frac 0", "--frac: 0 is not"),
        ("--frac nan", "--frac: nan is not"),
        ("-b 0", "-b/--batch-size: 0 is not"),
        ("-b 1", "-b/--batch-size: 1 is not a whole number of at least 2"),
        ("-B 0", "-B/--epochs: 0 is not"),
        ("-B nan", "-B/--epochs: nan is not"),
        ("-B inf", "-B/--epochs: inf is not"),
        ("-B -1", "-B/--epochs: -1 is not"),
        ("--lr nan", "--lr: nan is not"),
        ("--lr inf", "--lr: inf is not"),
        ("--lr -0.1", "--lr: -0.1 is not"),
        ("--lr-drops 0", "--lr-drops: 0 is not"),
        ("--lr-drops 1 nan", "--lr-drops: nan is not"),
        ("--lr-drops 1,2", "--lr-drops: 1,2 is not"),
        ("--lr-decay 0", "--lr-decay: 0 is not"),
        ("--momentum 1", "--momentum: 1 is not"),
        ("--weight-decay -1", "--weight-decay: -1 is not"),
        ("--dropout 1", "--dropout: 1 is not"),
        ("-s -1", "-s/--seed: -1 is not"),
        ("-s 1.5", "-s/--seed: 1.5 is not"),
        (f"-s {2**64}", f"-s/--seed: {2**64} is not"),
        ("-m allcn", "did you mean allcnn?"),
        ("-m resnet", "-m/--model: there is no resnet"),
        ("-m resnet", "lenet, allcnn, wrn-28-10, wrn-16-4"),
        ("-d mnits", "did you mean mnist?"),
        ("-d cifar", "did you mean cifar10"),
        ("-d imagenet", "mnist, fashion, cifar10, cifar100, svhn, digits"),
        ("--method parl", "did you mean parle?"),
        ("--method adam", "parle, entropy-sgd, elastic-sgd, sgd"),
        ("--gama 0.1", "unknown argument --gama; did you mean --gamma?"),
        ("--gama=0.1", "did you mean --gamma?"),
        ("--gama=0.0123456789", "did you mean --gamma?"),
        ("--batchsize 64", "unknown argument --batchsize; did you mean --batch-size?"),
        ("--replica 3", "unknown argument --replica; did you mean --replicas?"),
        ("--sync 3", "unknown argument --sync"),
        ("-x", "unknown argument -x; python parle_mpi.py -h"),
        ("lenet", "unknown argument lenet; python parle_mpi.py -h"),
        ("-n 3 cifar10", "unknown argument cifar10"),
        ("--whiten yes", "unknown argument yes"),
        ("--eval-every 0", "--eval-every: 0 is not"),
        ("--amp fp16", "--amp: there is no fp16"),
        ("-L auto --gamma 0", "-L auto needs a pull towards the anchor: --gamma"),
        ("-L auto --method sgd", "-L auto needs a pull towards the anchor: --gamma"),
        ("--data /nonexistent", "--data /nonexistent"),
        (f"--data {__file__}", f"--data {__file__}"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(line, told, capsys):
    assert told in complaint(capsys, parse, line)


@pytest.mark.parametrize(
    ("line", "size", "told"),
    [
        ("-n 5", 12, "12 ranks cannot be shared equally by -n 5 replicas: use -n with one of 1, 2, 3, 4, 6, 12\n"),
        ("-n 12", 3, "3 ranks cannot be shared equally by -n 12 replicas: use -n with one of 1, 3\n"),
        ("-n 3 -b 7", 12, "-b 7 leaves less than 2 images for each of 4 ranks of a replica: -b 8 or more\n"),
        (
            "--method sgd -b 23",
            12,
            "-b 23 leaves less than 2 images for each of 12 ranks of a replica: -b 24 or more\n",
        ),
    ],
)
def test_what_does_not_fit_the_ranks_is_told_in_one_line(line, size, told, capsys):
    assert told in complaint(capsys, parse, line, size)


@pytest.mark.parametrize(("line", "size"), [("-n 3 -b 8", 12), ("--method sgd -b 24", 12), ("-n 3 -b 2", 3)])
def test_two_images_a_rank_are_enough(line, size):
    assert parse(line, size).batch_size == int(line.split()[-1])


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "cpu:x", "cpu:1", "meta"])
def test_a_device_that_is_not_here_is_told_in_one_line(name, capsys):
    assert f"--device {name} " in complaint(capsys, options.devices, name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_told_in_one_line(capsys):
    assert complaint(capsys, options.devices, "cuda").endswith("use one of cpu\n")


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_without_an_accelerator_the_device_is_the_cpu(name, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert options.devices(name) == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        *((name, ["cuda:0", "cuda:1"]) for name in ("auto", "cuda")),
        *((name, [name]) for name in ("cuda:0", "cuda:1", "cpu")),
    ],
)
def test_a_device_with_a_number_is_itself_and_one_without_all_there_are(name, found, monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert options.devices(name) == [torch.device(device) for device in found]
    assert complaint(capsys, options.devices, "cuda:2").endswith("use one of cuda:0, cuda:1, cpu\n")
    assert complaint(capsys, options.devices, "xpu").endswith("use one of cuda:0, cuda:1, cpu\n")


def test_a_device_is_named_as_its_maker_calls_it_where_torch_can_tell(monkeypatch):
    assert options.name(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(
        torch, "get_device_module", lambda device: SimpleNamespace(get_device_name=lambda device: "Fast 9000")
    )
    assert options.name(torch.device("cuda", 1)) == "cuda:1 (Fast 9000)"


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as exit:
        parse("-h")
    out, err = capsys.readouterr()
    assert (exit.value.code, err) == (0, "")
    assert set(FLAGS) <= set(re.findall(FLAG, out))


LAUNCHED = [
    ("PMI_RANK", "PMI_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("PMIX_RANK", "ANY"),
]


@pytest.mark.parametrize(("rank", "size"), LAUNCHED)
@pytest.mark.parametrize("line", ["-n 0", "--gama 1", "--data /nonexistent"])
def test_one_rank_tells_of_a_mistake(rank, size, line, monkeypatch, capsys):
    monkeypatch.setenv(size, "3")
    monkeypatch.setenv(rank, "0")
    complaint(capsys, parse, line)
    monkeypatch.setenv(rank, "1")
    with pytest.raises(options.Mistake) as mistake:
        parse(line)
    options.tell("parle_mpi.py", mistake.value)
    assert tuple(capsys.readouterr()) == ("", "")


def test_one_rank_alone_prints_the_help(monkeypatch, capsys):
    monkeypatch.setenv("PMI_SIZE", "3")
    monkeypatch.setenv("PMI_RANK", "1")
    with pytest.raises(SystemExit) as exit:
        parse("-h")
    assert (exit.value.code, *capsys.readouterr()) == (0, "", "")
