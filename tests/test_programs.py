"""Both programs on the same command, and main() of parle_gpu.py in this process."""

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
from parle import cli, experiment, launcher, training
from tests.conftest import OFFLINE, ROOT

pytestmark = pytest.mark.usefixtures("no_launcher")

PROGRAMS = ["parle_gpu.py", "parle_mpi.py"]
FLAGS = """--alpha 0.5 --outer-lr-scale 3 --outer-momentum 0.25 --gamma 0.02 --rho 0.03 --lr 0.08 --momentum 0.75
    --weight-decay 0.001 --dropout 0.125 -b 32 -L 5 -B 0.35 --lr-drops 0.25 --lr-decay 0.5 --frac 0.375 --augment -s 7
    --eval-every 3"""
ROUND = ["round", "epoch", "loss", "error", "lr", "gamma", "rho", "spread"]
EVAL = ["round", "epoch", "master_loss", "master_error", "replica_errors", "ensemble_error", "distances"]
END = ["master_error", "best_master_error", "images"]
AVERAGED = ["running_stats_master_error", "running_stats_replica_errors", "running_stats_ensemble_error"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def of(log, event):
    return [line for line in log if line["event"] == event]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# The same command for both


def refuse(*given, **named):
    raise urllib.error.URLError("no network here")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, python):
    """What each program left and printed, of three replicas and without a network.

    parle_mpi.py runs as the README says, in a clean copy of the tree; parle_gpu.py in this process.
    """
    tree = tmp_path_factory.mktemp("clone") / "parle"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "runs", "proc", "__pycache__"))
    arguments = ["-n", "3", *FLAGS.split()]
    done = python("parle_mpi.py", *arguments, cwd=tree, timeout=200, OMP_NUM_THREADS="1", **OFFLINE)
    assert done.returncode == 0, done.stderr

    here = tmp_path_factory.mktemp("here")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        for names in launcher.LAUNCHERS.values():
            for name in filter(None, names):
                patch.delenv(name, raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(here)
        patch.setattr(sys, "argv", ["parle_gpu.py", *arguments])
        patch.setattr("urllib.request.urlopen", refuse)
        parle_gpu.main()

    runs = {}
    for program, place, out in (("parle_mpi.py", tree, done.stdout), ("parle_gpu.py", here, printed.getvalue())):
        (folder,) = (place / "runs").iterdir()
        master = torch.load(folder / "master.pt", weights_only=True)
        runs[program] = SimpleNamespace(folder=folder, log=read(folder / "log.jsonl"), master=master, out=out)
    return runs


@pytest.mark.timeout(300)
def test_both_programs_are_the_same_run(runs):
    """Order, augmentation and dropout of each replica included: one mini-batch that differed would show in all."""
    one, other = (runs[program].log for program in PROGRAMS)
    assert [line["event"] for line in one] == [line["event"] for line in other]
    for event, figures in (("round", ROUND), ("eval", EVAL), ("end", END)):
        for left, right in zip(of(one, event), of(other, event), strict=True):
            for name in figures:
                assert left[name] == pytest.approx(right[name], rel=1e-6), f"{name} of {event} {left.get('round')}"
    given, given_too = one[0]["arguments"], other[0]["arguments"]
    assert given.pop("program") != given_too.pop("program")
    assert given.items() >= given_too.items()
    assert [name for name in of(one, "eval")[-1] if name.startswith("averaged_")] == AVERAGED
    for name in AVERAGED:
        assert of(one, "eval")[-1][name] == pytest.approx(of(other, "eval")[-1][name], rel=1e-6), name

    left, right = (runs[program].master for program in PROGRAMS)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert (value - right[name]).float().norm() <= 1e-6 * value.float().norm(), name


@pytest.mark.parametrize("program", PROGRAMS)
def test_three_replicas_train(program, runs):
    log = runs[program].log
    rounds, evals = of(log, "round"), of(log, "eval")
    assert (log[0]["event"], log[0]["replicas"], log[0]["devices"]) == ("start", 3, ["cpu"] * 3)
    assert log[0].get("ranks") == {"parle_gpu.py": None, "parle_mpi.py": 3}[program]
    assert log[0]["arguments"]["seed"] == 7
    assert [(line["round"], line["lr"]) for line in rounds] == [(3, 0.08), (6, 0.04)]
    growth = 1 + 1 / (2 * 17)
    assert [line["gamma"] for line in rounds] == pytest.approx([0.02 * growth**k for k in (2, 5)])
    assert [line["rho"] for line in rounds] == pytest.approx([0.03 * 5 * 3 * growth**k for k in (2, 5)])
    assert rounds[1]["loss"] < rounds[0]["loss"] and rounds[1]["error"] < rounds[0]["error"]
    assert rounds[0]["spread"] == 0 < rounds[1]["spread"]
    assert [line["round"] for line in evals] == [3, 6]
    for line in evals:
        assert len(line["replica_errors"]) == 3
        assert len({round(distance, 6) for distance in line["distances"]}) == 3
        assert all(0 < distance < 0.2 for distance in line["distances"])
    assert log[-1]["images"] == 3 * 6 * 5 * 32
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
def test_screen_shows_devices_folder_and_errors(program, runs):
    run = runs[program]
    assert all(words in run.out for words in ("parle", "3 replicas", "1 thread", "cpu", f"runs/{run.folder.name}"))
    assert ("3 ranks" in run.out) == (program == "parle_mpi.py")
    assert all(words in run.out for words in ("master", "replica", "ensemble"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_master_is_a_plain_state_dict(program, runs):
    run = runs[program]
    assert {path.name for path in run.folder.iterdir()} == {"log.jsonl", "master.pt", "checkpoints"}
    models.build("lenet", channels=1, size=8, classes=10).load_state_dict(run.master)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_reaches_what_it_controls(program, monkeypatch, proc, tmp_path):
    arrived = {}

    def spy(module, name):
        real = getattr(module, name)

        def call(*positional, **named):
            arrived[name] = dict(named, positional=positional)
            return {} if name == "evaluate" else real(*positional, **named)

        monkeypatch.setattr(module, name, call)

    main = {"parle_gpu.py": parle_gpu, "parle_mpi.py": parle_mpi}[program]
    acts = [(loader, "load"), (loader, "Batches"), (models, "build"), (main, "Parle"), (engine, "evaluate")]
    for module, name in [*acts, (options, "devices")]:
        spy(module, name)
    monkeypatch.setattr(
        engine, "train", lambda *positional, **named: arrived.update(train=named) or (positional[3]() and [])
    )
    more = ["-n", "1", "-d", "digits", "-m", "allcnn", "--zca", "--amp", "bf16", "--device", "cpu"]
    monkeypatch.setattr(
        sys, "argv", [program, *FLAGS.split(), *more, "--proc", str(proc), "--out", str(tmp_path / "run")]
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with contextlib.suppress(SystemExit):  # what trains nothing has not come to its end
        main.main()

    steps = dict(lr=0.08, momentum=0.75, weight_decay=0.001, sync_every=5)
    coupling = dict(gamma=0.02, rho=0.03, alpha=0.5, outer_lr_scale=3, outer_momentum=0.25, batches_per_epoch=17)
    assert arrived["Parle"].items() >= (steps | coupling).items()
    share = dict(batch_size=32, seed=7, replica=0, replicas=1, frac=0.375, augment=True, part=(0, 1))
    assert arrived["Batches"].items() >= share.items()
    assert arrived["train"].items() >= dict(epochs=0.35, lr_drops=[0.25], lr_decay=0.5, eval_every=3, amp=True).items()
    assert arrived["build"]["positional"] == ("allcnn", 1, 8, 10, 0.125)
    assert arrived["load"]["positional"] == ("digits", None, proc, True)
    assert arrived["evaluate"].items() >= dict(batch_size=32, replicas=[0]).items()
    assert arrived["devices"]["positional"] == ("cpu",)


# parle_gpu.py in this process


@pytest.fixture
def main(monkeypatch, tmp_path):
    """main() with these arguments, in an empty folder, with one thread: other processes may need the other cores."""

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["parle_gpu.py", *map(str, arguments)])
        parle_gpu.main()

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return main


@pytest.fixture
def train(main, proc, monkeypatch):
    """Train on 240 digits, test on 60; gives the log, event by event."""
    load = loader.load

    def few(*given):
        data = load(*given)
        train, test = slice(240), slice(60)
        return data._replace(
            train_images=data.train_images[train],
            train_labels=data.train_labels[train],
            test_images=data.test_images[test],
            test_labels=data.test_labels[test],
        )

    def train(*arguments, out="run"):
        monkeypatch.setattr(loader, "load", few)
        main("-d", "digits", "--proc", proc, "--out", out, "-b", 24, *arguments)
        return read(loader.Path(out) / "log.jsonl")

    return train


@pytest.fixture
def complaint(main, capsys, tmp_path):
    """What a user sees of a mistake: one line on stderr. No file is left."""

    def complaint(*arguments):
        with pytest.raises(SystemExit) as exit:
            main(*arguments)
        out, err = capsys.readouterr()
        assert (exit.value.code, out, err.count("\n"), err[-1:]) == (2, "", 1, "\n")
        assert err.startswith("parle_gpu.py: error: ")
        assert not os.listdir()
        return err

    return complaint


def test_same_command_gives_same_run_and_other_seed_other(train):
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        log = train("-n", 2, "-B", 0.2, "-L", 5, "-s", seed, out=f"run{number}")
        figures = [[line[name] for name in ROUND] for line in of(log, "round")]
        runs.append(figures + [[line[name] for name in EVAL] for line in of(log, "eval")])
    assert runs[0] == runs[1]
    assert runs[0][0][2] != runs[2][0][2]


def test_replicas_draw_in_different_orders(train):
    log = train("-n", 2, "-L", 2, "-B", 0.3, "--dropout", 0)
    assert min(of(log, "eval")[-1]["distances"]) > 1e-3


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
    assert (log[0]["replicas"], log[0]["sync_every"]) == (replicas, sync_every)
    losses = [line["loss"] for line in of(log, "round")]
    assert losses[-1] < min(1.8, losses[0]), losses


def test_auto_shortens_its_rounds_as_lr_falls(train):
    log = train("-n", 1, "-L", "auto", "--gamma", 0.0105, "-B", 0.6, "--lr-drops", 0.3)
    assert log[0]["sync_every"] == "auto"
    assert log[-1]["images"] == 24 * (10 + 9 + 9 + 2 + 2 + 1)  # round(0.1 / γ_k), then round(0.02 / γ_k)


def test_bfloat16_trains_like_float32_with_float32_weights(train, monkeypatch):
    real, kinds = models.build, set()

    def build(*given):
        model = real(*given)
        model.classifier[0].register_forward_hook(
            lambda layer, _, output: kinds.add((layer.training, output.dtype, layer.weight.dtype))
        )
        return model

    short = ("-n", 2, "-L", 2, "-B", 0.4, "--eval-every", 1)
    expected = [line["loss"] for line in of(train(*short, out="float32"), "round")]
    monkeypatch.setattr(models, "build", build)
    losses = [line["loss"] for line in of(train(*short, "--amp", "bf16"), "round")]
    assert losses == pytest.approx(expected, rel=0.1) and losses != expected
    assert kinds == {(True, torch.bfloat16, torch.float32), (False, torch.float32, torch.float32)}
    kept = torch.load("run/master.pt", weights_only=True)
    assert {value.dtype for value in kept.values()} == {torch.float32, torch.int64}


def test_help_lists_gpus_per_replica(main, capsys):
    with pytest.raises(SystemExit) as exit:
        main("-h")
    out, err = capsys.readouterr()
    assert (exit.value.code, err) == (0, "")
    assert "--gpus-per-replica N" in out and "--replicas N" in out


# Mistakes


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
def test_mistake_is_reported_before_data_is_read(arguments, words, complaint, monkeypatch):
    monkeypatch.setattr(loader, "load", None)
    told = complaint(*arguments.split())
    assert all(word in told for word in words), told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_is_a_mistake_that_lists_cpu(complaint):
    told = complaint("--device", "cuda")
    assert "--device cuda" in told and "cpu" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("-d digits -b 2000", ["2000", "-b 1437"]),
        ("-d digits --out /proc/none", ["--out", "/proc/none"]),
        ("-d mnist", ["mnist", "--data DIR", "-d digits"]),
        ("--data .", ["MNIST/raw/train-images-idx3-ubyte", "--data"]),
    ],
)
def test_unusable_data_or_folder_is_one_line(arguments, words, complaint, proc, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    told = complaint("--proc", proc, *arguments.split())
    assert all(word in told for word in words), told


def test_existing_run_is_not_overwritten(main, proc, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text("precious")
    with pytest.raises(SystemExit) as exit:
        main("-n", 1, "-d", "digits", "--proc", proc, "--out", tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and "--out" in line and str(tmp_path / "log.jsonl") in line
    assert (tmp_path / "log.jsonl").read_text() == "precious"


def test_under_a_launcher_it_exits_with_2_and_one_line(python, tmp_path):
    done = python(ROOT / "parle_gpu.py", "-n", 2, "-d", "digits", ranks=2, cwd=tmp_path, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("parle_gpu.py: error: ") and "parle_mpi.py" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "told", [{"PMI_SIZE": "1", "PMI_RANK": "0"}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}]
)
def test_the_only_task_of_a_launcher_trains(told, train, monkeypatch):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert train("-n", 2, "-L", 1, "-B", 0.1)[0]["replicas"] == 2


# Memory


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried …"),
]


@pytest.mark.parametrize(
    ("module", "name", "error"),
    [
        (engine, "train", OUT_OF_MEMORY[0]),
        (experiment, "model", OUT_OF_MEMORY[1]),
        (loader.Dataset, "to", OUT_OF_MEMORY[0]),
    ],
)
def test_out_of_memory_reports_what_a_replica_takes(module, name, error, main, proc, monkeypatch, capsys):
    def fail(*given, **named):
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
    monkeypatch.setattr(engine, "train", lambda *given, **named: (_ for _ in ()).throw(error))
    with pytest.raises(RuntimeError) as caught:
        train()
    assert caught.value is error


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
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


def asked(**changed):
    return SimpleNamespace(
        **dict(model="lenet", batch_size=32, dropout=0.25, replicas=3, gpus_per_replica=None) | changed
    )


def images(channels=1, size=28):
    return SimpleNamespace(channels=channels, size=size, classes=10)


def test_replica_takes_seven_times_its_weights():
    vectors, _ = parle_gpu.estimate_memory(asked(), images())
    assert vectors == 7 * 4 * 132_220


@pytest.mark.parametrize(
    ("model", "data", "batch_size"),
    [("lenet", images(), 32), ("lenet", images(size=8), 2), ("wrn-16-4", images(3, 8), 2)],
)
def test_memory_of_a_batch_is_what_forward_saves(model, data, batch_size):
    args = asked(model=model, batch_size=batch_size)
    network = models.build(model, data.channels, data.size, 10, 0.25)
    own = {value.untyped_storage().data_ptr() for value in network.state_dict().values()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.rand(batch_size, data.channels, data.size, data.size))
    direct = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    assert parle_gpu.estimate_memory(args, data)[1] == pytest.approx(direct, rel=0.02)


def test_estimating_memory_allocates_nothing(monkeypatch):
    before, made = torch.get_rng_state(), []
    real = models.build
    monkeypatch.setattr(models, "build", lambda *given: made.append(real(*given)) or made[0])
    _, batch = parle_gpu.estimate_memory(asked(model="wrn-28-10", batch_size=10**6), images(3, 32))
    assert batch > 10**6 * 2**20
    assert {parameter.device.type for parameter in made[0].parameters()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), before)


# Devices


def gpus(count):
    return [torch.device("cuda", index) for index in range(count)]


@pytest.mark.parametrize("count", range(1, 9))
def test_devices_are_assigned_round_robin(count):
    for replicas in range(1, 10):
        spread = parle_gpu.assign_devices(gpus(count), asked(replicas=replicas))
        places = [[device.index for device in devices] for devices in spread]
        width = max(1, count // replicas)
        assert len(places) == replicas
        assert all(own == list(range(own[0], own[0] + width)) for own in places)
        homes = [own[0] for own in places]
        assert homes == [width * (replica % (count // width)) for replica in range(replicas)]
        assert len(set(homes)) == min(replicas, count)  # none shares while there is one to spare
        used = [homes.count(home) for home in set(homes)]
        assert max(used) - min(used) <= 1


@pytest.mark.parametrize(
    ("count", "replicas", "width", "places"),
    [
        (4, 2, 1, [[0], [1]]),
        (4, 3, 2, [[0, 1], [2, 3], [0, 1]]),
        (5, 3, 2, [[0, 1], [2, 3], [0, 1]]),
        (4, 2, 4, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (2, 5, 1, [[0], [1], [0], [1], [0]]),
    ],
)
def test_gpus_per_replica_is_respected(count, replicas, width, places):
    spread = parle_gpu.assign_devices(gpus(count), asked(replicas=replicas, gpus_per_replica=width))
    assert [[device.index for device in devices] for devices in spread] == places


@pytest.mark.parametrize(
    ("count", "changed", "words"),
    [
        (2, dict(gpus_per_replica=3), ["--gpus-per-replica 3", "2"]),
        (1, dict(gpus_per_replica=2), ["--gpus-per-replica 2", "1"]),
        (2, dict(replicas=1, batch_size=3, gpus_per_replica=2), ["-b 3", "2 GPUs", "-b 4"]),
        (4, dict(replicas=1, batch_size=9, gpus_per_replica=4), ["-b 9", "4 GPUs", "-b 8"]),
    ],
)
def test_too_few_devices_or_images_are_a_mistake(count, changed, words):
    with pytest.raises(cli.UsageError) as caught:
        parle_gpu.assign_devices(gpus(count), asked(**changed))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("batch_size", [4, 8, 128, 131])
def test_two_images_per_gpu_are_enough(batch_size):
    width = min(4, batch_size // 2)
    (devices,) = parle_gpu.assign_devices(gpus(4), asked(replicas=1, batch_size=batch_size, gpus_per_replica=width))
    assert len(devices) == width


@pytest.mark.parametrize(("batch_size", "width"), [(3, 1), (4, 2), (9, 3), (13, 3), (14, 4)])
def test_default_gpus_have_two_images_each(batch_size, width):
    (devices,) = parle_gpu.assign_devices(gpus(4), asked(replicas=1, batch_size=batch_size))
    assert len(devices) == width


class DataParallel(nn.DataParallel):
    """torch's, on the CPU: the module on each device's chunk of the batch, one after the other."""

    def __init__(self, module, device_ids):
        nn.Module.__init__(self)
        self.module, self.device_ids = module, device_ids

    def forward(self, inputs):
        return torch.cat([self.module(chunk) for chunk in inputs.chunk(len(self.device_ids))])


@pytest.fixture
def pretend(monkeypatch):
    """The CPU as so many GPUs. Gives what was put where: copies of the data, the data of each replica, seeds."""

    def pretend(count):
        told = SimpleNamespace(copies=[], sources=[], models=[], seeds=[])
        to, batches, model = loader.Dataset.to, loader.BatchLoader, experiment.build_model

        def send(data, device):
            told.copies.append(str(device))
            return to(data, torch.device("cpu"))._replace(origin=str(device))

        def draw(data, **named):
            told.sources.append((named["replica"], data.origin))
            return batches(data, **named)

        def build(args, data):
            told.models.append(data.origin)
            return model(args, data)

        def parallel(module, device_ids):
            return DataParallel(module, device_ids)

        monkeypatch.setattr(options, "devices", lambda name: gpus(count))
        monkeypatch.setattr(options, "name", str)
        monkeypatch.setattr(loader.Dataset, "to", send)
        monkeypatch.setattr(loader, "Batches", draw)
        monkeypatch.setattr(experiment, "model", build)
        monkeypatch.setattr(parle_gpu, "DataParallel", parallel)
        real = training.seed_device
        monkeypatch.setattr(engine, "seed", lambda *seed: told.seeds.append(seed) or real(*seed))
        return told

    return pretend


SHORT = ("-L", 2, "-B", 0.2)  # 2 rounds of 2 mini-batches


def test_replica_is_data_parallel_over_its_devices(train, pretend):
    told = pretend(4)
    log = train("-n", 2, *SHORT)
    assert log[0]["devices"] == ["cuda:0 + cuda:1", "cuda:2 + cuda:3"]
    assert told.copies == ["cuda:0", "cuda:2"]
    assert told.sources == [(0, "cuda:0"), (1, "cuda:2")]
    assert told.models == ["cuda:0", "cuda:2", "cuda:0"]  # the last is evaluated, at home
    assert [place.index for place, _ in told.seeds[:4]] == [0, 1, 2, 3]
    rounds = mini_batches = replicas = devices = 2
    assert len({number for _, number in told.seeds}) == len(told.seeds) == rounds * mini_batches * replicas * devices
    assert of(log, "round")[-1]["loss"] > 0
    models.build("lenet", 1, 8, 10).load_state_dict(torch.load("run/master.pt", weights_only=True))


def test_replica_computes_on_the_devices_it_got(train, pretend, monkeypatch):
    pretend(6)
    made = []
    monkeypatch.setattr(parle_gpu, "DataParallel", lambda module, ids: made.append(ids) or DataParallel(module, ids))
    train("-n", 3, "--gpus-per-replica", 3, *SHORT)
    assert made == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


def test_threads_of_data_parallel_use_bfloat16(train, pretend, monkeypatch):
    pretend(2)
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


def test_replicas_on_one_device_share_its_data(train, pretend):
    told = pretend(2)
    log = train("-n", 3, *SHORT)
    assert log[0]["devices"] == ["cuda:0", "cuda:1", "cuda:0"]
    assert told.copies == ["cuda:0", "cuda:1"]
    assert told.sources == [(0, "cuda:0"), (1, "cuda:1"), (2, "cuda:0")]


def test_placement_does_not_change_the_run(train, pretend):
    figures = []
    for count in (1, 2, 3):
        pretend(count)
        log = train("-n", 3, *SHORT, out=f"run{count}")
        figures.append([[line[name] for name in EVAL] for line in of(log, "eval")])
    assert figures[0] == figures[1] == figures[2]


# On GPUs


@pytest.mark.cuda
@needs_cuda
def test_gpu_trains_like_cpu(train):
    losses = []
    for device in ("cpu", "cuda"):
        log = train("-n", 2, "-B", 0.2, "-L", 5, "--dropout", 0, "--device", device, out=device)
        losses.append([line["loss"] for line in of(log, "round")])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.cuda
@needs_cuda
def test_gpu_dropout_is_reproducible(train):
    losses = []
    for run in range(2):
        torch.rand(1000, device="cuda")
        log = train("-n", 3, "-B", 0.2, "-L", 5, "--device", "cuda:0", out=f"run{run}")
        losses.append([line["loss"] for line in of(log, "round")])
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
@pytest.mark.filterwarnings("default")  # torch warns where the two are not alike
def test_replica_over_two_gpus_learns(train):
    log = train("-n", 1, "--gpus-per-replica", 2, "-L", 5, "-B", 3, "--device", "cuda")
    assert " + " in log[0]["devices"][0]
    assert log[-1]["master_error"] < 20
