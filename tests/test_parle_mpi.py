"""The program and its class as real MPI processes, each run with a time limit."""

import json
import sys

import pytest
import torch

import engine
import loader
import models
import parle_mpi
from tests.conftest import ROOT

OFFLINE = dict(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")  # nobody listens there


@pytest.fixture(scope="session")
def proc(tmp_path_factory):
    return tmp_path_factory.mktemp("proc")


@pytest.fixture
def train(python, proc, tmp_path):
    """Train on digits; gives the log, event by event, and what was printed."""

    def train(*arguments, ranks=None, **environment):
        out = tmp_path / "run"
        common = ("-d", "digits", "--proc", proc, "--out", out)
        done = python(ROOT / "parle_mpi.py", *common, *arguments, ranks=ranks, **environment)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()], done.stdout

    return train


def of(log, event):
    return [line for line in log if line["event"] == event]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_in_lockstep_with_the_reference(python, ranks):
    done = python(ROOT / "tests" / "lockstep.py", ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all equal\n")


def test_n_3_starts_three_ranks_and_trains_three_replicas(train, tmp_path):
    log, printed = train("-n", 3, "-B", 0.42)
    start, end = log[0], log[-1]
    assert (start["event"], start["replicas"], start["ranks"], start["devices"]) == ("start", 3, 3, ["cpu"] * 3)
    rounds = of(log, "round")
    assert [line["round"] for line in rounds] == list(range(1, 6))
    assert rounds[-1]["loss"] < rounds[0]["loss"] / 5
    assert rounds[0]["spread"] == 0 < rounds[1]["spread"]
    assert [line["rho"] for line in rounds[:2]] == pytest.approx([0.75, 0.75 * (1 + 1 / 24)])
    assert [line["gamma"] for line in rounds[:2]] == pytest.approx([0.01, 0.01 * (1 + 1 / 24)])
    (evaluation,) = of(log, "eval")
    assert len(evaluation["replica_errors"]) == len(evaluation["distances"]) == 3
    assert all(0 < distance < 0.2 for distance in evaluation["distances"])
    assert evaluation["master_error"] < 10
    assert end["images"] == 3 * 5 * 25 * 128
    assert all(line.startswith("lenet on digits  ") for line in printed.splitlines())

    model = models.build("lenet", channels=1, size=8, classes=10)
    model.load_state_dict(torch.load(tmp_path / "run" / "master.pt", weights_only=True))


def test_the_same_command_gives_the_same_run(train, tmp_path):
    runs = []
    for _ in range(2):
        log, _ = train("-n", 2, "-B", 0.16, "-L", 5)
        runs.append(
            [[line["loss"], line["error"], line["spread"]] for line in of(log, "round")] + [log[-2]["master_loss"]]
        )
        (tmp_path / "run").rename(tmp_path / f"run{len(runs)}")
    assert runs[0] == runs[1]


def test_replicas_have_their_own_order(train):
    log, _ = train("-n", 2, "-L", 2, "-B", 1, "--dropout", 0)
    assert min(of(log, "eval")[-1]["distances"]) > 1e-3


def test_twelve_ranks_on_two_cores_are_twelve_replicas(train):
    log, _ = train("-B", 0.08, "-L", 2, ranks=12)
    assert log[0]["replicas"] == log[0]["ranks"] == len(of(log, "eval")[0]["replica_errors"]) == 12
    assert log[0]["threads"] == 1


def test_two_replicas_over_four_ranks_share_their_batches(train):
    log, _ = train("-n", 2, "-B", 0.16, "-L", 5, "-b", 50, ranks=4)
    assert (log[0]["replicas"], log[0]["ranks"]) == (2, 4)
    assert log[-1]["images"] == 2 * of(log, "round")[-1]["round"] * 5 * 50


def test_sgd_is_data_parallel_over_the_ranks(train):
    log, _ = train("--method", "sgd", "-B", 2, ranks=3)
    assert (log[0]["replicas"], log[0]["ranks"], log[0]["sync_every"]) == (1, 3, 1)
    rounds = of(log, "round")
    assert [line["round"] for line in rounds] == [12, 24]  # one line for up to 25 mini-batches
    assert rounds[1]["loss"] < rounds[0]["loss"]
    assert len(of(log, "eval")) == 2


@pytest.mark.parametrize("method", ["elastic-sgd", "entropy-sgd"])
def test_presets_train(train, method):
    epochs = dict(zip(("elastic-sgd", "entropy-sgd"), (3, 0.25), strict=True))[method]
    log, _ = train("--method", method, "-n", 2, "-B", epochs)
    assert of(log, "round")[-1]["loss"] < 1.5


def test_ranks_with_different_settings_stop_with_one_line(python, proc):
    command = [ROOT / "parle_mpi.py", "-d", "digits", "--proc", proc, "--lr"]
    done = python(*command, 0.1, ":", "-n", 1, sys.executable, *command, 0.2, ranks=1)
    assert done.returncode == 2
    assert done.stderr == (
        "parle_mpi.py: error: lr is 0.1 on rank 0 and 0.2 on rank 1: start every rank with the same\n"
    )


@pytest.mark.parametrize(
    ("arguments", "ranks", "words"),
    [
        (["-n", 3, "-d", "digits"], 4, "use -n with one of 1, 2, 4"),
        (["-b", 2000, "-d", "digits"], 2, "-b 1437 or less"),
        (["-d", "mnist", "-n", 2], None, "give --data DIR"),
        (["--data", "/", "-n", 1], None, "/MNIST/raw/train-images-idx3-ubyte is missing"),
        (["-d", "digits", "--out", "/proc/none", "-n", 2], None, "name a new folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_for_all_ranks(python, tmp_path, arguments, ranks, words):
    proc = tmp_path / "proc"
    done = python(ROOT / "parle_mpi.py", "--proc", proc, *arguments, ranks=ranks, cwd=tmp_path, **OFFLINE)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("parle_mpi.py: error: ")
    assert words in line
    assert not (tmp_path / "runs").exists()


def test_without_a_network_it_says_so_and_trains_on_digits(python, tmp_path):
    done = python(ROOT / "parle_mpi.py", "-n", 2, "-B", 0.08, "--proc", tmp_path / "proc", cwd=tmp_path, **OFFLINE)
    assert done.returncode == 0, done.stderr
    warning, *lines = done.stdout.splitlines()
    assert warning.startswith("WARNING: training on digits, scikit-learn's 8 x 8 images, instead of mnist: ")
    assert all(line.startswith("lenet on digits  ") for line in lines)
    (log,) = (tmp_path / "runs").glob("*-lenet-digits/log.jsonl")
    assert json.loads(log.read_text().splitlines()[0])["dataset"] == "digits"


FLAGS = """--alpha 0.5 --outer-step 2 --outer-momentum 0.25 --gamma 0.02 --rho 0.03 --lr 0.05 --momentum 0.75
    --weight-decay 0.001 --dropout 0.125 -b 64 -L 5 -B 0.5 --lr-drops 0.25 --lr-decay 0.5 --frac 0.75 --augment -s 7
    --eval-every 3 --amp bf16 -m allcnn --whiten"""


def test_every_flag_arrives_where_it_acts(monkeypatch, proc, tmp_path):
    arrived = {}

    def spy(module, name):
        real = getattr(module, name)

        def call(*positional, **named):
            arrived[name] = dict(named, positional=positional)
            return real(*positional, **named)

        monkeypatch.setattr(module, name, call)

    for module, name in (
        (loader, "load"),
        (loader, "Batches"),
        (models, "build"),
        (parle_mpi, "Parle"),
        (engine, "evaluate"),
    ):
        spy(module, name)
    monkeypatch.setattr(
        engine, "train", lambda *positional, **named: arrived.update(train=named) or (positional[3]() and [])
    )
    monkeypatch.setattr(sys, "argv", ["parle_mpi.py", "-n", "1", "-d", "digits", *FLAGS.split()])
    sys.argv += ["--proc", str(proc), "--out", str(tmp_path / "run")]
    for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMIX_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    parle_mpi.main()

    steps = dict(lr=0.05, momentum=0.75, weight_decay=0.001, sync_every=5, replicas=1)
    coupling = dict(gamma=0.02, rho=0.03, alpha=0.5, outer_step=2, outer_momentum=0.25, batches_per_epoch=17)
    assert arrived["Parle"].items() >= (steps | coupling).items()
    assert arrived["Batches"].items() >= dict(batch_size=64, seed=7, frac=0.75, augment=True, part=(0, 1)).items()
    assert arrived["train"].items() >= dict(epochs=0.5, lr_drops=[0.25], lr_decay=0.5, eval_every=3, amp=True).items()
    assert arrived["build"]["positional"] == ("allcnn", 1, 8, 10, 0.125)
    assert arrived["load"]["positional"] == ("digits", None, proc, True)
    assert arrived["evaluate"]["batch_size"] == 64


def test_all_flags_together_train(train):
    log, _ = train("-n", 2, *FLAGS.replace("allcnn", "lenet").replace("bf16", "off").split())
    rounds = of(log, "round")
    assert [(line["round"], line["lr"]) for line in rounds] == [(3, 0.05), (6, 0.025), (8, 0.025)]
    assert [line["round"] for line in of(log, "eval")] == [3, 6, 8]
    assert log[0]["arguments"]["seed"] == 7


def test_auto_shortens_its_rounds_as_lr_falls(train):
    log, _ = train("-n", 1, "-L", "auto", "-B", 0.5, "--lr-drops", 0.25)
    assert log[0]["sync_every"] == "auto"
    assert log[-1]["images"] == 128 * (10 + 10 + 9 + 2 + 2 + 2)  # round(0.1 / γ_k), then round(0.02 / γ_k)


def test_an_exception_in_the_program_ends_every_rank(python, proc, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import loader

def fail(self):
    raise RuntimeError("no more batches")

if os.environ["PMI_RANK"] == "1":
    loader.Batches.__next__ = fail
runpy.run_path({str(ROOT / "parle_mpi.py")!r}, run_name="__main__")
""")
    done = python(script, "-d", "digits", "--proc", proc, "--out", tmp_path / "run", ranks=3)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == "rank 1: RuntimeError: no more batches"


def test_a_mistake_of_one_rank_alone_is_told_once_and_ends_all(python, proc):
    command = [ROOT / "parle_mpi.py", "-d", "digits", "--proc", proc, "--device"]
    done = python(*command, "cpu", ":", "-n", 1, sys.executable, *command, "nonsense", ranks=1)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("parle_mpi.py: error: --device nonsense is not to be had here")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ranks_on_gpus_train_as_ranks_on_the_cpu_do(train, tmp_path):
    losses = []
    for device in ("cpu", "cuda"):
        log, _ = train("-n", 2, "-B", 0.16, "-L", 5, "--dropout", 0, "--device", device)
        losses.append([line["loss"] for line in of(log, "round")])
        (tmp_path / "run").rename(tmp_path / device)
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_run_is_never_written_over(python, proc, tmp_path):
    (tmp_path / "log.jsonl").write_text("precious")
    done = python(ROOT / "parle_mpi.py", "-n", 1, "-d", "digits", "--proc", proc, "--out", tmp_path)
    assert done.returncode == 2
    assert "name a new folder" in done.stderr
    assert (tmp_path / "log.jsonl").read_text() == "precious"


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_mnist_reaches_the_error_that_the_readme_names(python, raw, tmp_path):
    command = ("-n", 3, "-B", 0.25, "--data", raw, "--proc", tmp_path / "proc", "--out", tmp_path / "run")
    done = python(ROOT / "parle_mpi.py", *command, timeout=900)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["master_error"] < 0.75
