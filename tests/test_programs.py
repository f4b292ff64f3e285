"""Both programs with the same command, and main() of parle_gpu.py in this process."""

import contextlib
import io
import json
import os
import shutil
import sys
import threading
import urllib.error
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import loader
import models
import parle_gpu
import parle_mpi
from parle import cli, evaluation, experiment, launcher, signals, training
from tests.conftest import OFFLINE, ROOT
from tests.test_docs import documented_fields

pytestmark = pytest.mark.usefixtures("no_launcher")

PROGRAMS = ["parle_gpu.py", "parle_mpi.py"]
FLAGS = """--alpha 0.5 --outer-lr-scale 3 --outer-momentum 0.25 --master-average 0.6 --gamma 0.02 --rho 0.03 --lr 0.08
    --momentum 0.75 --weight-decay 0.001 --dropout 0.125 -b 32 -L 5 -B 0.35 --lr-drops 0.25 --lr-decay 0.5 --frac 0.375
    --augment -s 7 --eval-every 3"""
ROUND = ["round", "epoch", "train_loss", "train_error", "lr", "gamma_k", "coupling_k", "replica_distance_rms"]
EVAL = ["round", "epoch", "master_loss", "master_error", "replica_errors", "ensemble_error", "replica_distances"]
UNAVERAGED = ["unaveraged_master_loss", "unaveraged_master_error"]  # with --master-average
FINISHED = ["master_error", "best_master_error", "images_seen"]
ERRORS = ("master_error", "unaveraged_master_error", "replica_errors", "ensemble_error")
RUNNING_STATS = [f"running_stats_{name}" for name in ERRORS]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def select(log, event):
    return [line for line in log if line["event"] == event]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# The same command for both


def refuse_connection(*positional, **named):
    raise urllib.error.URLError("there is no network")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, python):
    """Return what each program wrote and printed while it trained three replicas without a network.

    parle_mpi.py runs as in the README, in a clean copy of the tree; parle_gpu.py runs in this process.
    """
    tree = tmp_path_factory.mktemp("clone") / "parle"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "runs", "proc", "__pycache__"))
    arguments = ["-n", "3", *FLAGS.split()]
    done = python("parle_mpi.py", *arguments, cwd=tree, timeout=200, OMP_NUM_THREADS="1", **OFFLINE)
    assert done.returncode == 0, done.stderr

    here = tmp_path_factory.mktemp("here")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        for variables in launcher.LAUNCHERS.values():
            for name in filter(None, variables):
                patch.delenv(name, raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(here)
        patch.setattr(sys, "argv", ["parle_gpu.py", *arguments])
        patch.setattr("urllib.request.urlopen", refuse_connection)
        parle_gpu.main()

    runs = {}
    for program, cwd, out in (("parle_mpi.py", tree, done.stdout), ("parle_gpu.py", here, printed.getvalue())):
        (folder,) = (cwd / "runs").iterdir()
        master = torch.load(folder / "master.pt", weights_only=True)
        runs[program] = SimpleNamespace(folder=folder, log=read(folder / "log.jsonl"), master=master, out=out)
    return runs


@pytest.mark.timeout(300)
def test_both_programs_train_identically(runs):
    """Order, augmentation and dropout are equal for each replica: if one mini-batch differed, all numbers would."""
    gpu, mpi = (runs[program].log for program in PROGRAMS)
    assert [line["event"] for line in gpu] == [line["event"] for line in mpi]
    for event, keys in (("round", ROUND), ("eval", EVAL + UNAVERAGED), ("finished", FINISHED)):
        for left, right in zip(select(gpu, event), select(mpi, event), strict=True):
            for key in keys:
                assert left[key] == pytest.approx(right[key], rel=1e-6), f"{key} of {event} {left.get('round')}"
    gpu_arguments, mpi_arguments = dict(gpu[0]["arguments"]), dict(mpi[0]["arguments"])
    for name in ("program", "proc"):  # they ran in two directories
        assert gpu_arguments.pop(name) != mpi_arguments.pop(name)
    assert mpi_arguments.pop("max_restarts") == 0
    assert gpu_arguments.items() >= mpi_arguments.items()
    last_evals = [select(log, "eval")[-1] for log in (gpu, mpi)]
    for key in RUNNING_STATS:
        assert last_evals[0][key] == pytest.approx(last_evals[1][key], rel=1e-6), key

    left, right = (runs[program].master for program in PROGRAMS)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert (value - right[name]).float().norm() <= 1e-6 * value.float().norm(), name


def test_log_over_mpi_has_exactly_the_documented_fields(runs):
    log = runs["parle_mpi.py"].log
    assert [line["event"] for line in log] == ["start", "round", "eval", "round", "eval", "finished"]
    fields = documented_fields("parle_mpi.py")
    assert [name for name in fields["eval"] if name.startswith("running_stats_")] == RUNNING_STATS
    for number, line in enumerate(log):
        only_in_last_eval = set(RUNNING_STATS) if number == 2 else set()
        assert line.keys() == {"event", *fields[line["event"]]} - only_in_last_eval, line["event"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_three_replicas_train(program, runs):
    log = runs[program].log
    rounds, evals = select(log, "round"), select(log, "eval")
    assert (log[0]["event"], log[0]["num_replicas"], log[0]["devices"]) == ("start", 3, ["cpu"] * 3)
    assert log[0].get("num_ranks") == {"parle_gpu.py": None, "parle_mpi.py": 3}[program]
    assert log[0]["arguments"]["seed"] == 7
    assert [(line["round"], line["lr"]) for line in rounds] == [(3, 0.08), (6, 0.04)]
    growth = 1 + 1 / (2 * 17)
    assert [line["gamma_k"] for line in rounds] == pytest.approx([0.02 * growth**k for k in (2, 5)])
    assert [line["coupling_k"] for line in rounds] == pytest.approx([0.03 * 5 * 3 * growth**k for k in (2, 5)])
    assert rounds[1]["train_loss"] < rounds[0]["train_loss"] and rounds[1]["train_error"] < rounds[0]["train_error"]
    assert rounds[0]["replica_distance_rms"] == 0 < rounds[1]["replica_distance_rms"]
    assert [line["round"] for line in evals] == [3, 6]
    for line in evals:
        assert len(line["replica_errors"]) == 3
        assert len({round(distance, 6) for distance in line["replica_distances"]}) == 3
        assert all(0 < distance < 0.2 for distance in line["replica_distances"])
    assert log[-1]["images_seen"] == 3 * 6 * 5 * 32
    assert log[-1]["master_error"] == evals[-1]["master_error"] < 70


@pytest.mark.parametrize("program", PROGRAMS)
def test_without_a_network_it_trains_on_digits(program, runs):
    run = runs[program]
    warning, *lines = run.out.splitlines()
    assert "WARNING" in warning and "digits" in warning and "mnist" in warning
    assert "lenet on digits" in "".join(lines)
    assert run.log[0]["dataset"] == run.log[0]["arguments"]["dataset"] == "digits"
    assert run.folder.name.endswith("-lenet-digits")


@pytest.mark.parametrize("program", PROGRAMS)
def test_screen_shows_devices_directory_and_errors(program, runs):
    run = runs[program]
    assert all(words in run.out for words in ("parle", "3 replicas", "1 thread", "cpu", f"runs/{run.folder.name}"))
    assert ("3 ranks" in run.out) == (program == "parle_mpi.py")
    assert all(words in run.out for words in ("master", "replica", "ensemble"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_saved_master_is_the_average(program, runs):
    run = runs[program]
    names = [name for name, _ in models.build("lenet", channels=1, size=8, classes=10).named_parameters()]
    shared = torch.load(run.folder / "checkpoints" / "00000006-0000" / "shared.pt", weights_only=True)
    assert shared.keys() == set(range(len(names)))
    for position, name in enumerate(names):
        assert torch.equal(run.master[name], shared[position]["master_average"])
        assert not torch.equal(run.master[name], shared[position]["master"])


@pytest.mark.parametrize("program", PROGRAMS)
def test_master_is_a_plain_state_dict(program, runs):
    run = runs[program]
    assert {path.name for path in run.folder.iterdir()} == {"log.jsonl", "master.pt", "checkpoints"}
    models.build("lenet", channels=1, size=8, classes=10).load_state_dict(run.master)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_reaches_what_it_controls(program, monkeypatch, proc, tmp_path):
    calls = {}

    def record(module, name):
        original = getattr(module, name)

        def call(*positional, **named):
            calls[name] = dict(named, positional=positional)
            return original(*positional, **named)

        monkeypatch.setattr(module, name, call)

    def train(replicas, optimizer, schedule, *, evaluate, amp, **_):
        calls.update(train=dict(schedule=schedule, amp=amp))
        yield {"event": "checkpoint_failed", "round": 0, "message": str(evaluate())}

    main = {"parle_gpu.py": parle_gpu, "parle_mpi.py": parle_mpi}[program]
    monkeypatch.setattr(evaluation, "evaluate", lambda *positional, **named: {})
    monkeypatch.setattr(experiment, "train", train)
    for module, name in [
        *((loader, "load"), (experiment, "BatchLoader"), (models, "build"), (main, "Parle")),
        *((evaluation, "evaluate"), (cli, "find_devices")),
    ]:
        record(module, name)
    others = ["-n", "1", "-d", "digits", "-m", "allcnn", "--zca", "--amp", "bf16", "--device", "cpu"]
    folders = ["--proc", str(proc), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", [program, *FLAGS.split(), *others, *folders, "--checkpoint-every", "4"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("mpi4py.MPI.Finalize", lambda: None)
    with pytest.raises(SystemExit) as exit:
        main.main()
    assert exit.value.code == signals.EXIT_RESUMABLE  # no `finished` event

    inner = dict(lr=0.08, momentum=0.75, weight_decay=0.001, sync_every=5)
    coupling = dict(gamma=0.02, rho=0.03, alpha=0.5, outer_lr_scale=3, outer_momentum=0.25, batches_per_epoch=17)
    assert calls["Parle"].items() >= (inner | coupling | dict(master_average=0.6)).items()
    batches = dict(batch_size=32, seed=7, replica=0, replicas=1, frac=0.375, augment=True, shard=(0, 1))
    assert calls["BatchLoader"].items() >= batches.items()
    schedule = training.Schedule(epochs=0.35, lr_drops=[0.25], lr_decay=0.5, eval_every=3, checkpoint_every=4)
    assert calls["train"] == dict(schedule=schedule, amp=True)
    assert calls["build"]["positional"] == ("allcnn", 1, 8, 10, 0.125)
    assert calls["load"]["positional"] == ("digits", None, proc, True)
    assert calls["evaluate"].items() >= dict(batch_size=32, replicas=[0]).items()
    assert calls["find_devices"]["positional"] == ("cpu",)


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_disable_malloc_trim(program, monkeypatch, tmp_path):
    class Called(Exception):
        pass

    def disable():
        raise Called

    monkeypatch.setattr(training, "disable_malloc_trim", disable)
    monkeypatch.setattr(sys, "argv", [program, "-n", "1", "-d", "digits", "--proc", str(tmp_path)])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(Called):
        {"parle_gpu.py": parle_gpu, "parle_mpi.py": parle_mpi}[program].main()


# parle_gpu.py in this process


@pytest.fixture
def main(monkeypatch, tmp_path):
    """Run main() with these arguments in an empty directory, on one thread: other processes may need the cores."""

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["parle_gpu.py", *map(str, arguments)])
        parle_gpu.main()

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return main


@pytest.fixture
def train(main, proc, monkeypatch):
    """Train on 240 digits and test on 60; return the events of the log."""
    load = loader.load

    def load_few(*positional):
        data = load(*positional)
        train, test = slice(240), slice(60)
        return data._replace(
            train_images=data.train_images[train],
            train_labels=data.train_labels[train],
            test_images=data.test_images[test],
            test_labels=data.test_labels[test],
        )

    def train(*arguments, out="run"):
        monkeypatch.setattr(loader, "load", load_few)
        main("-d", "digits", "--proc", proc, "--out", out, "-b", 24, *arguments)
        return read(loader.Path(out) / "log.jsonl")

    return train


@pytest.fixture
def usage_error(main, capsys, tmp_path):
    """Return the line that a usage error prints on stderr; nothing else is printed and no file is written."""

    def usage_error(*arguments):
        with pytest.raises(SystemExit) as exit:
            main(*arguments)
        out, err = capsys.readouterr()
        assert (exit.value.code, out, err.count("\n"), err[-1:]) == (2, "", 1, "\n")
        assert err.startswith("parle_gpu.py: error: ")
        assert not os.listdir()
        return err

    return usage_error


def test_runs_are_equal_if_and_only_if_the_seed_is(train):
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        log = train("-n", 2, "-B", 0.2, "-L", 5, "-s", seed, out=f"run{number}")
        numbers = [[line[name] for name in ROUND] for line in select(log, "round")]
        runs.append(numbers + [[line[name] for name in EVAL] for line in select(log, "eval")])
    assert runs[0] == runs[1]
    assert runs[0][0][2] != runs[2][0][2]


def test_replicas_draw_in_different_orders(train):
    log = train("-n", 2, "-L", 2, "-B", 0.3, "--dropout", 0)
    assert min(select(log, "eval")[-1]["replica_distances"]) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "replicas", "sync_every"),
    [
        ("--method elastic-sgd -n 2 -B 3", 2, 1),
        ("--method entropy-sgd -B 0.2", 1, 25),
        ("--method sgd -B 3", 1, 1),
    ],
)
def test_presets_train(arguments, replicas, sync_every, train):
    log = train(*arguments.split())
    assert (log[0]["num_replicas"], log[0]["sync_every"]) == (replicas, sync_every)
    losses = [line["train_loss"] for line in select(log, "round")]
    assert losses[-1] < min(1.8, losses[0]), losses


def test_auto_shortens_rounds_as_lr_falls(train):
    log = train("-n", 1, "-L", "auto", "--gamma", 0.0105, "-B", 0.6, "--lr-drops", 0.3)
    assert log[0]["sync_every"] == "auto"
    assert log[-1]["images_seen"] == 24 * (10 + 9 + 9 + 2 + 2 + 1)  # round(0.1 / γ_k), then round(0.02 / γ_k)


def test_bfloat16_trains_like_float32_with_float32_weights(train, monkeypatch):
    original, dtypes = models.build, set()

    def build(*positional):
        model = original(*positional)
        model.classifier[0].register_forward_hook(
            lambda layer, _, output: dtypes.add((layer.training, output.dtype, layer.weight.dtype))
        )
        return model

    short = ("-n", 2, "-L", 2, "-B", 0.4, "--eval-every", 1)
    expected = [line["train_loss"] for line in select(train(*short, out="float32"), "round")]
    monkeypatch.setattr(models, "build", build)
    losses = [line["train_loss"] for line in select(train(*short, "--amp", "bf16"), "round")]
    assert losses == pytest.approx(expected, rel=0.1) and losses != expected
    assert dtypes == {(True, torch.bfloat16, torch.float32), (False, torch.float32, torch.float32)}
    master = torch.load("run/master.pt", weights_only=True)
    assert {value.dtype for value in master.values()} == {torch.float32, torch.int64}


def test_help_lists_gpus_per_replica(main, capsys):
    with pytest.raises(SystemExit) as exit:
        main("-h")
    out, err = capsys.readouterr()
    assert (exit.value.code, err) == (0, "")
    assert "--gpus-per-replica N" in out and "--replicas N" in out


# Usage errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--gpus-per-replica 0", ["--gpus-per-replica", "0"]),
        ("--gpus-per-replica 2 --device cpu", ["--gpus-per-replica 2", "CUDA", "cpu"]),
        ("--gpu-per-replica 2", ["--gpu-per-replica", "--gpus-per-replica"]),
        ("--device cuda:99", ["--device cuda:99"]),
        ("-L auto --gamma 0", ["-L auto", "--gamma"]),
    ],
)
def test_usage_error_is_reported_before_data_is_read(arguments, words, usage_error, monkeypatch):
    monkeypatch.setattr(loader, "load", None)
    line = usage_error(*arguments.split())
    assert all(word in line for word in words), line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_the_error_lists_cpu(usage_error):
    line = usage_error("--device", "cuda")
    assert "--device cuda" in line and "cpu" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("-d digits -b 2000", ["2000", "-b 1437"]),
        ("-d digits --out /proc/none", ["--out", "/proc/none"]),
        ("-d mnist", ["mnist", "--data DIR", "-d digits"]),
        ("--data .", ["MNIST/raw/train-images-idx3-ubyte", "--data"]),
    ],
)
def test_unusable_data_or_directory_is_one_line(arguments, words, usage_error, proc, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", refuse_connection)
    line = usage_error("--proc", proc, *arguments.split())
    assert all(word in line for word in words), line


def test_existing_run_is_not_overwritten(main, proc, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text("precious")
    with pytest.raises(SystemExit) as exit:
        main("-n", 1, "-d", "digits", "--proc", proc, "--out", tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and f"--out {tmp_path}" in line and "--resume" in line
    assert (tmp_path / "log.jsonl").read_text() == "precious"


def test_under_a_launcher_it_exits_with_2_and_one_line(python, tmp_path):
    done = python(ROOT / "parle_gpu.py", "-n", 2, "-d", "digits", ranks=2, cwd=tmp_path, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("parle_gpu.py: error: ") and "parle_mpi.py" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "environment", [{"PMI_SIZE": "1", "PMI_RANK": "0"}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}]
)
def test_the_only_task_of_a_launcher_trains(environment, train, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert train("-n", 2, "-L", 1, "-B", 0.1)[0]["num_replicas"] == 2


# Memory


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried …"),
]


@pytest.mark.parametrize(
    ("module", "name", "error"),
    [
        (experiment, "train", OUT_OF_MEMORY[0]),
        (experiment, "build_model", OUT_OF_MEMORY[1]),
        (loader.Dataset, "to", OUT_OF_MEMORY[0]),
    ],
)
def test_out_of_memory_reports_what_a_replica_takes(module, name, error, main, proc, monkeypatch, capsys):
    def fail(*positional, **named):
        raise error

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(SystemExit) as exit:
        main("-d", "digits", "--proc", proc, "-m", "allcnn", "-b", 1400)
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2
    words = ("3", "allcnn", "44 MiB", "263 MiB", "1400", "-b", "-n", "--amp bf16")
    assert line.startswith("parle_gpu.py: error: ") and all(word in line for word in words), line


def test_other_errors_propagate(train, monkeypatch):
    error = RuntimeError("device-side assert triggered")
    monkeypatch.setattr(experiment, "train", lambda *positional, **named: (_ for _ in ()).throw(error))
    with pytest.raises(RuntimeError) as caught:
        train()
    assert caught.value is error


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_batch_beyond_memory_is_one_line(python, proc, tmp_path):
    script = tmp_path / "limited.py"
    script.write_text(f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import sklearn.datasets, torch
import parle_gpu
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])  # imports the rest of torch
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 200 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (size, size))
parle_gpu.main()
""")
    arguments = ("-n", 1, "-m", "wrn-16-4", "-d", "digits", "-b", 1400, "--proc", proc, "--out", tmp_path / "run")
    done = python(script, *arguments, OMP_NUM_THREADS="1")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith("parle_gpu.py: error: ") and "wrn-16-4" in line and "73 MiB" in line
    assert [event["event"] for event in read(tmp_path / "run" / "log.jsonl")] == ["start"]


def arguments_with(**changed):
    defaults = dict(model="lenet", batch_size=32, dropout=0.25, replicas=3, gpus_per_replica=None)
    return SimpleNamespace(**defaults | changed)


def shape(channels=1, size=28):
    """Return the shape of a data set, as `estimate_memory` reads it."""
    return SimpleNamespace(channels=channels, size=size, classes=10)


def test_replica_takes_seven_vectors_of_its_size():
    vectors, _ = parle_gpu.estimate_memory(arguments_with(), shape())
    assert vectors == 7 * 4 * 132_220


@pytest.mark.parametrize(
    ("model", "data", "batch_size"),
    [("lenet", shape(), 32), ("lenet", shape(size=8), 2), ("wrn-16-4", shape(3, 8), 2)],
)
def test_batch_memory_is_what_the_forward_pass_saves(model, data, batch_size):
    args = arguments_with(model=model, batch_size=batch_size)
    network = models.build(model, data.channels, data.size, 10, 0.25)
    own = {value.untyped_storage().data_ptr() for value in network.state_dict().values()}
    saved = {}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        network(torch.rand(batch_size, data.channels, data.size, data.size))
    measured = sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in own)
    assert parle_gpu.estimate_memory(args, data)[1] == pytest.approx(measured, rel=0.02)


def test_estimating_memory_allocates_nothing(monkeypatch):
    rng_state, built = torch.get_rng_state(), []
    build = models.build
    monkeypatch.setattr(models, "build", lambda *positional: built.append(build(*positional)) or built[0])
    _, batch = parle_gpu.estimate_memory(arguments_with(model="wrn-28-10", batch_size=10**6), shape(3, 32))
    assert batch > 10**6 * 2**20
    assert {parameter.device.type for parameter in built[0].parameters()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), rng_state)


# Devices


def gpus(count):
    return [torch.device("cuda", index) for index in range(count)]


@pytest.mark.parametrize("count", range(1, 9))
def test_devices_are_assigned_round_robin(count):
    for replicas in range(1, 10):
        assigned = parle_gpu.assign_devices(gpus(count), arguments_with(replicas=replicas))
        indices = [[device.index for device in devices] for devices in assigned]
        width = max(1, count // replicas)
        assert len(indices) == replicas
        assert all(own == list(range(own[0], own[0] + width)) for own in indices)
        first = [own[0] for own in indices]
        assert first == [width * (replica % (count // width)) for replica in range(replicas)]
        assert len(set(first)) == min(replicas, count)  # replicas share devices only if there are too few
        counts = [first.count(index) for index in set(first)]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("count", "replicas", "width", "expected"),
    [
        (4, 2, 1, [[0], [1]]),
        (4, 3, 2, [[0, 1], [2, 3], [0, 1]]),
        (5, 3, 2, [[0, 1], [2, 3], [0, 1]]),
        (4, 2, 4, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (2, 5, 1, [[0], [1], [0], [1], [0]]),
    ],
)
def test_gpus_per_replica_is_respected(count, replicas, width, expected):
    assigned = parle_gpu.assign_devices(gpus(count), arguments_with(replicas=replicas, gpus_per_replica=width))
    assert [[device.index for device in devices] for devices in assigned] == expected


@pytest.mark.parametrize(
    ("count", "changed", "words"),
    [
        (2, dict(gpus_per_replica=3), ["--gpus-per-replica 3", "2"]),
        (1, dict(gpus_per_replica=2), ["--gpus-per-replica 2", "1"]),
        (2, dict(replicas=1, batch_size=3, gpus_per_replica=2), ["-b 3", "2 GPUs", "-b 4"]),
        (4, dict(replicas=1, batch_size=9, gpus_per_replica=4), ["-b 9", "4 GPUs", "-b 8"]),
    ],
)
def test_too_few_devices_or_images_are_a_usage_error(count, changed, words):
    with pytest.raises(cli.UsageError) as caught:
        parle_gpu.assign_devices(gpus(count), arguments_with(**changed))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("batch_size", [4, 8, 128, 131])
def test_two_images_per_gpu_are_enough(batch_size):
    width = min(4, batch_size // 2)
    args = arguments_with(replicas=1, batch_size=batch_size, gpus_per_replica=width)
    (devices,) = parle_gpu.assign_devices(gpus(4), args)
    assert len(devices) == width


@pytest.mark.parametrize(("batch_size", "width"), [(3, 1), (4, 2), (9, 3), (13, 3), (14, 4)])
def test_default_gpus_have_two_images_each(batch_size, width):
    (devices,) = parle_gpu.assign_devices(gpus(4), arguments_with(replicas=1, batch_size=batch_size))
    assert len(devices) == width


class DataParallel(nn.DataParallel):
    """torch's DataParallel on the CPU: the module processes each device's chunk of the batch in turn."""

    def __init__(self, module, device_ids):
        nn.Module.__init__(self)
        self.module, self.device_ids = module, device_ids

    def forward(self, inputs):
        return torch.cat([self.module(chunk) for chunk in inputs.chunk(len(self.device_ids))])


@pytest.fixture
def simulate_gpus(monkeypatch):
    """Simulate GPUs on the CPU; return their data copies, each replica's data, the data of each model, and seeds."""

    def simulate_gpus(count):
        record = SimpleNamespace(copies=[], replicas=[], models=[], seeds=[])
        to, batch_loader, build_model = loader.Dataset.to, loader.BatchLoader, experiment.build_model
        seed_device = training.seed_device

        def copy(data, device):
            record.copies.append(str(device))
            return to(data, torch.device("cpu"))._replace(source_dir=str(device))

        def load_batches(data, **named):
            record.replicas.append((named["replica"], data.source_dir))
            return batch_loader(data, **named)

        def build(args, data):
            record.models.append(data.source_dir)
            return build_model(args, data)

        monkeypatch.setattr(cli, "find_devices", lambda name: gpus(count))
        monkeypatch.setattr(cli, "device_name", str)
        monkeypatch.setattr(loader.Dataset, "to", copy)
        monkeypatch.setattr(experiment, "BatchLoader", load_batches)
        monkeypatch.setattr(experiment, "build_model", build)
        monkeypatch.setattr(parle_gpu, "DataParallel", DataParallel)
        monkeypatch.setattr(training, "seed_device", lambda *seed: record.seeds.append(seed) or seed_device(*seed))
        return record

    return simulate_gpus


SHORT = ("-L", 2, "-B", 0.2)  # 2 rounds of 2 steps


def test_replica_is_data_parallel_over_its_devices(train, simulate_gpus):
    record = simulate_gpus(4)
    log = train("-n", 2, *SHORT)
    assert log[0]["devices"] == ["cuda:0 + cuda:1", "cuda:2 + cuda:3"]
    assert record.copies == ["cuda:0", "cuda:2"]
    assert record.replicas == [(0, "cuda:0"), (1, "cuda:2")]
    assert record.models == ["cuda:0", "cuda:2", "cuda:0"]  # the last one is the evaluation model
    assert [device.index for device, _ in record.seeds[:4]] == [0, 1, 2, 3]
    rounds = steps = replicas = devices = 2
    assert len({seed for _, seed in record.seeds}) == len(record.seeds) == rounds * steps * replicas * devices
    assert select(log, "round")[-1]["train_loss"] > 0
    models.build("lenet", 1, 8, 10).load_state_dict(torch.load("run/master.pt", weights_only=True))


def test_replica_computes_on_the_devices_assigned_to_it(train, simulate_gpus, monkeypatch):
    simulate_gpus(6)
    built = []
    monkeypatch.setattr(parle_gpu, "DataParallel", lambda module, ids: built.append(ids) or DataParallel(module, ids))
    train("-n", 3, "--gpus-per-replica", 3, *SHORT)
    assert built == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


def test_threads_of_data_parallel_use_bfloat16(train, simulate_gpus, monkeypatch):
    simulate_gpus(2)
    dtypes = []

    class Threaded(DataParallel):
        def forward(self, inputs):
            outputs = []

            def work():
                outputs.append(self.module(inputs))
                dtypes.append(torch.get_autocast_dtype("cuda"))

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            return outputs[0]

    monkeypatch.setattr(parle_gpu, "DataParallel", Threaded)
    for amp in ("off", "bf16"):
        train("-n", 1, "--amp", amp, "-L", 1, "-B", 0.1, out=amp)
    assert (dtypes[0], dtypes[-1]) == (torch.float16, torch.bfloat16)


def test_replicas_on_one_device_share_its_data(train, simulate_gpus):
    record = simulate_gpus(2)
    log = train("-n", 3, *SHORT)
    assert log[0]["devices"] == ["cuda:0", "cuda:1", "cuda:0"]
    assert record.copies == ["cuda:0", "cuda:1"]
    assert record.replicas == [(0, "cuda:0"), (1, "cuda:1"), (2, "cuda:0")]


def test_device_assignment_does_not_change_the_result(train, simulate_gpus):
    results = []
    for count in (1, 2, 3):
        simulate_gpus(count)
        log = train("-n", 3, *SHORT, out=f"run{count}")
        results.append([[line[name] for name in EVAL] for line in select(log, "eval")])
    assert results[0] == results[1] == results[2]


# On GPUs


@pytest.mark.cuda
@needs_cuda
def test_gpu_trains_like_cpu(train):
    losses = []
    for device in ("cpu", "cuda"):
        log = train("-n", 2, "-B", 0.2, "-L", 5, "--dropout", 0, "--device", device, out=device)
        losses.append([line["train_loss"] for line in select(log, "round")])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.cuda
@needs_cuda
def test_gpu_dropout_is_reproducible(train):
    losses = []
    for run in range(2):
        torch.rand(1000, device="cuda")
        log = train("-n", 3, "-B", 0.2, "-L", 5, "--device", "cuda:0", out=f"run{run}")
        losses.append([line["train_loss"] for line in select(log, "round")])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.cuda
@needs_cuda
def test_batch_beyond_gpu_memory_is_one_line(main, proc, capsys):
    torch.cuda.set_per_process_memory_fraction(1e-3)
    try:
        with pytest.raises(SystemExit) as exit:
            main("-d", "digits", "--proc", proc, "-m", "wrn-28-10", "--device", "cuda:0", "-b", 1400)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2
    assert line.startswith("parle_gpu.py: error: ") and "wrn-28-10" in line and "974 MiB" in line


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.filterwarnings("default")  # torch warns if the two differ
def test_replica_over_two_gpus_learns(train):
    log = train("-n", 1, "--gpus-per-replica", 2, "-L", 5, "-B", 3, "--device", "cuda")
    assert " + " in log[0]["devices"][0]
    assert log[-1]["master_error"] < 20
