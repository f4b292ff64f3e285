"""What --doctor tells, of this machine and of one with parts missing."""

import importlib.metadata
import re
import subprocess
import sys
import time
from itertools import count, pairwise

import pytest
import torch
from torch import nn

import doctor
import engine
import experiment
import launch
import loader
import options
import parle_gpu
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("no_launcher")


def typed(*words):
    return options.parser("parle_gpu.py", "Parle.").parse_args([*map(str, words)])


def resolved(*words):
    return options.resolve(typed(*words), None)


def labels(out):
    """The left column. Every line has both."""
    rows = [re.fullmatch(r"(.{11}) (\S.*)", line) for line in out.splitlines()]
    return [row[1].strip() for row in rows]


def value(out, label):
    (line,) = (line for line in out.splitlines() if line[:12].strip() == label)
    return line[12:]


# The data


@pytest.mark.parametrize("name", loader.SOURCES)
def test_synthetic_data_have_the_shape_and_are_enough_for_a_mini_batch(name):
    args = resolved("-d", name, "-b", 6, "--frac", 0.1, "--augment")
    data = doctor.synthetic(args)
    assert (data.channels, data.size, data.classes) == loader.SOURCES[name][4:7]
    inputs, targets = next(experiment.batches(args, data, 2))
    assert inputs.shape == (6, data.channels, data.size, data.size) and len(targets) == 6
    assert inputs.isfinite().all() and 0.5 < inputs.std() < 2


@pytest.fixture
def data_row(tmp_path):
    """What is told of the data of a command line, and whether that will do."""

    def row(*words):
        return doctor._data(resolved("--proc", tmp_path / "proc", *words))

    return row


def test_data_are_told_from_what_is_there(data_row, tmp_path):
    proc, raw = tmp_path / "proc", tmp_path / "raw"
    assert data_row("-d", "mnist") == (f"mnist is not here: the first run downloads it to {proc}/raw/MNIST/raw", True)
    raw.mkdir()
    assert data_row("--data", raw) == (f"mnist is missing: there is no {raw}/MNIST/raw", False)
    (raw / "MNIST" / "raw").mkdir(parents=True)  # empty, as a download that fails leaves it
    assert data_row("--data", raw)[1] is False
    (raw / "MNIST" / "raw" / "train-images-idx3-ubyte").touch()
    assert data_row("--data", raw) == (f"mnist, raw in {raw}/MNIST/raw; the first run writes {proc}/mnist", True)
    assert data_row("-m", "allcnn", "--data", raw)[1] is False
    digits = data_row("-d", "digits", "--whiten")
    assert digits == (f"digits, part of scikit-learn; the first run writes {proc}/digits-whitened", True)
    loader.load("digits", proc=proc)
    assert data_row("-d", "digits") == (f"digits, pre-processed in {proc}/digits", True)
    assert data_row("-d", "digits", "--data", raw) == (f"digits, pre-processed in {proc}/digits", True)
    assert data_row("-d", "digits", "--whiten") == digits
    (proc / "digits" / "meta.json").write_text("{")
    told, well = data_row("-d", "digits")
    assert "meta.json" in told or "digits is damaged" in told
    assert not well


# What it takes


@pytest.mark.parametrize(("batch", "sync"), [(1.0, 0.0), (1.0, 0.005), (0.02, 0.01), (1.0, 0.0101), (1e-3, 5.0)])
def test_the_smallest_length_is_the_first_that_keeps_under_the_share(batch, sync):
    least = doctor.smallest_length(batch, sync)

    def share(length):
        return sync / (length * batch + sync)

    assert least >= 1 and share(least) < doctor.SHARE
    assert least == 1 or share(least - 1) >= doctor.SHARE - 1e-12


class Network(nn.Sequential):
    """Takes so many milliseconds, once those of the first pass are over."""

    def __init__(self, milliseconds):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
        self.pauses = pairwise([0.3, *[milliseconds / 1e3] * 1000])

    def forward(self, inputs):
        time.sleep(next(self.pauses)[0])
        return super().forward(inputs)


def of(networks, **settings):
    return parle_gpu.Parle(
        [network.parameters() for network in networks], **dict(lr=0.0, sync_every=2, batches_per_epoch=3) | settings
    )


def test_what_is_measured_is_what_passes_and_weights_stay(monkeypatch):
    monkeypatch.setattr(doctor, "SECONDS", 0.2)
    networks, args = [Network(20), Network(40)], resolved("-d", "digits", "-b", 4)
    optimizer = of(networks, **doctor.STILL)
    spent, master = count(), optimizer.master.clone()
    means = optimizer._mean_messages

    def slowly():
        optimizer._stopwatch.total += 0.007 if next(spent) != 4 else 0.5
        means()

    monkeypatch.setattr(optimizer, "_mean_messages", slowly)
    sources = [experiment.batches(args, doctor.synthetic(args), replica) for replica in range(2)]
    measured = doctor.measure(optimizer, list(zip(networks, sources, strict=True)), engine.ALONE, False)
    assert measured == (pytest.approx(0.06, rel=0.5), pytest.approx(0.007, rel=0.2), 0)
    assert torch.equal(optimizer.master, master) and optimizer.rounds == doctor.SYNCS
    assert all(torch.equal(vectors["weights"], master) for vectors in optimizer.vectors)


@pytest.mark.parametrize("amp", [False, True])
def test_in_bfloat16_it_is_measured_in_bfloat16(amp, monkeypatch):
    monkeypatch.setattr(doctor, "SECONDS", 0.0)
    network, args, kinds = Network(0), resolved("-d", "digits", "-b", 4), set()
    network.register_forward_hook(lambda layer, given, output: kinds.add(output.dtype))
    source = experiment.batches(args, doctor.synthetic(args), 0)
    doctor.measure(of([network]), [(network, source)], engine.ALONE, amp)
    assert kinds == {torch.bfloat16 if amp else torch.float32}


@pytest.mark.parametrize(
    ("seconds", "shown"), [(2.07e-5, "0.0207 ms"), (0.0284, "28.4 ms"), (0.3162, "316 ms"), (41.3, "41,300 ms")]
)
def test_durations_have_three_digits(seconds, shown):
    assert doctor._duration(seconds) == shown


# parle_gpu.py


@pytest.fixture
def main(monkeypatch, tmp_path, capsys):
    """parle_gpu.py --doctor in an empty folder; gives the exit status and what it told. It leaves nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "SECONDS", 0.0)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["parle_gpu.py", "--doctor", *map(str, arguments)])
        status = 0
        try:
            parle_gpu.main()
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        assert err == "" and not list(tmp_path.iterdir())
        return status, out

    return main


def test_one_process_tells_what_is_here_and_what_it_takes(main):
    status, out = main("-m", "allcnn", "-d", "digits", "-n", 2, "-b", 8, "--device", "cpu")
    parts = ["python", "torch", "torchvision", "numpy", "data", "threads", "replica 0", "replica 1"]
    assert (status, labels(out)) == (0, [*parts, "model", "mini-batch", "messages", "L"])
    assert value(out, "torch") == torch.__version__.partition("+")[0]
    assert value(out, "replica 1") == "cpu"
    assert value(out, "model") == "allcnn: 1,665,438 parameters, 6.66 MB"
    assert re.fullmatch(r"[\d.,]+ ms, forward and backward, 8 images, of each of 2 replicas", value(out, "mini-batch"))
    assert re.fullmatch(r"[\d.]+ ms, 1,665,438 floats on one device", value(out, "messages"))
    line = r"\d+ or more keeps synchronization under 1 % of the time; 25 takes \d\.\d\d %"
    assert re.fullmatch(line, value(out, "L"))


@pytest.mark.parametrize(
    ("arguments", "length"), [(("-L", 1), 1), (("-L", "auto"), 10), (("--method", "elastic-sgd"), 1)]
)
def test_rounds_of_any_length_are_told(arguments, length, main):
    status, out = main("-d", "digits", "-b", 8, *arguments)
    assert (status, value(out, "L").partition("; ")[2].partition(" ")[0]) == (0, str(length))


def test_a_missing_package_is_told_and_nothing_measured(main, monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "torchvision":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    status, out = main("-d", "digits")
    assert (status, labels(out)) == (1, ["python", "torch", "torchvision", "numpy", "data"])
    assert value(out, "torchvision") == "missing: pip install torchvision"


def test_missing_data_are_told(main, tmp_path_factory):
    status, out = main("--data", tmp_path_factory.mktemp("empty"))
    assert status == 1 and value(out, "data").startswith("mnist is missing: there is no ")


# parle_mpi.py


@pytest.mark.parametrize(
    ("mpiexec", "launcher", "well"), [(None, None, False), (None, "Slurm", True), ("/m", None, True)]
)
def test_ranks_need_an_mpiexec_or_a_launcher(mpiexec, launcher, well, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(launch, "mpiexec", lambda: mpiexec)
    monkeypatch.setattr(launch, "launcher", lambda: launcher)
    monkeypatch.setattr(doctor, "_library", lambda: ("MPICH 5", True))
    assert doctor.examine(typed("-d", "digits", "--proc", tmp_path), mpi=True) is well
    out = capsys.readouterr().out
    assert labels(out) == ["python", "torch", "torchvision", "numpy", "mpi4py", "MPI", "mpiexec", "launcher", "data"]
    assert value(out, "launcher").startswith(launcher or "none: ")
    assert value(out, "mpiexec") == (mpiexec or "none beside this Python or on the PATH: pip install mpich")


@pytest.mark.parametrize(
    ("status", "out", "err", "told"),
    [
        (0, "MPICH 5.0.2\n", "", ("MPICH 5.0.2", True)),
        (1, "", "Traceback\nImportError: no libmpi", "ImportError: no libmpi"),
        (-11, "", "", "exit status -11"),
    ],
)
def test_a_broken_mpi_is_told(status, out, err, told, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess((), status, out, err))
    expected = told if status == 0 else (f"none that mpi4py could load ({told}): pip install mpich", False)
    assert doctor._library() == expected


def test_an_mpi_that_hangs_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "PATIENCE", 0.01)
    assert doctor._library() == ("none that mpi4py could load within 0.01 s", False)


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, None),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "MPICH or Intel MPI"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "1"}, "Open MPI"),
        ({"PMIX_RANK": "1"}, "PMIx"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
    ],
)
def test_the_launcher_has_a_name(environment, name):
    assert launch.launcher(environment) == name


@pytest.mark.slow
def test_the_program_starts_its_own_ranks_and_the_first_tells(python, tmp_path):
    done = python(ROOT / "parle_mpi.py", "--doctor", "-n", 2, "-d", "digits", "-b", 4, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    parts = ["python", "torch", "torchvision", "numpy", "mpi4py", "MPI", "mpiexec", "launcher", "data"]
    places = ["ranks", "replica 0", "replica 1", "model", "mini-batch", "allreduce", "L"]
    assert labels(done.stdout) == parts + places
    assert value(done.stdout, "replica 1").startswith("rank 1 on ")
    assert re.fullmatch(r"[\d.,]+ ms, 132,220 floats over 2 ranks", value(done.stdout, "allreduce"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_under_a_launcher_its_ranks_are_used(python, tmp_path):
    done = python(ROOT / "parle_mpi.py", "--doctor", "-n", 1, "-d", "digits", "-b", 4, ranks=2, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert value(done.stdout, "launcher") == "MPICH or Intel MPI"
    assert value(done.stdout, "ranks").startswith("2 on 1 machine, ")
    assert re.fullmatch(r"rank 0 on \S.*, rank 1 on \S.*", value(done.stdout, "replica 0"))
    line = r"[\d.,]+ ms a mini-batch, over the ranks of a replica: [\d.]+ %, whatever L"
    assert re.fullmatch(line, value(done.stdout, "gradient"))
    assert len(set(labels(done.stdout))) == len(labels(done.stdout))
    assert not {"allreduce", "L"} & set(labels(done.stdout))  # one replica has nobody to synchronize with


def test_without_an_mpi_library_it_says_so_and_starts_no_rank(python, tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("class rc: initialize = True\n")
    (tmp_path / "mpi4py" / "MPI.py").write_text("raise ImportError('cannot load MPI library')\n")
    done = python(ROOT / "parle_mpi.py", "--doctor", "-n", 2, "-d", "digits", PYTHONPATH=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    told = "none that mpi4py could load (ImportError: cannot load MPI library): pip install mpich"
    assert value(done.stdout, "MPI") == told
    assert labels(done.stdout)[-1] == "data"
