"""What --doctor reports about this machine and about one where something is missing."""

import importlib.metadata
import platform
import re
import subprocess
import sys
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import loader
import parle_gpu
import parle_mpi
from parle import cli, doctor, experiment, launcher, supervision
from parle.distributed import Group, Groups
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("no_launcher")


ENVIRONMENT = ["python", "torch", "torchvision", "numpy", "mpi4py", "MPI", "mpiexec", "launcher", "data"]


def arguments(*words):
    """Return the complete arguments of a command line."""
    return cli.complete(cli.build_parser("parle_gpu.py", "Parle.").parse_args([*map(str, words)]), None)


def labels(out):
    """Return the left column. Every line has both."""
    rows = [re.fullmatch(r"(.{11}) (\S.*)", line) for line in out.splitlines()]
    return [row[1].strip() for row in rows]


def value(out, label):
    (line,) = (line for line in out.splitlines() if line[:12].strip() == label)
    return line[12:]


# The data


@pytest.mark.parametrize("name", loader.DATASETS)
def test_synthetic_data_have_the_shape_of_the_data_set(name):
    args, spec = arguments("-d", name, "-b", 6, "--frac", 0.1, "--augment"), loader.DATASETS[name]
    data = doctor.synthetic_data(args)
    assert (data.channels, data.size, data.classes) == (spec.channels, spec.size, spec.classes)
    inputs, targets = next(experiment.build_replica(args, data, 2).batches)
    assert inputs.shape == (6, data.channels, data.size, data.size) and len(targets) == 6
    assert inputs.isfinite().all() and 0.5 < inputs.std() < 2


@pytest.fixture
def data_row(tmp_path, capsys):
    """A function that returns what is printed about the data of a command line, and whether a run can use it."""

    def row(*words):
        can_start = doctor.check_environment(arguments("--proc", tmp_path / "proc", *words), mpi=False)
        return value(capsys.readouterr().out, "data"), can_start

    return row


def test_data_row_follows_the_files(data_row, tmp_path):
    proc, raw = tmp_path / "proc", tmp_path / "raw"

    def is_row(row, can_start, *words):
        return row[1] is can_start and all(str(word) in row[0] for word in words)

    assert is_row(data_row("-d", "mnist"), True, "mnist", proc / "raw/MNIST/raw")
    raw.mkdir()
    assert is_row(data_row("--data", raw), False, "mnist", raw / "MNIST/raw")
    (raw / "MNIST" / "raw").mkdir(parents=True)  # empty, as a failed download leaves it
    assert data_row("--data", raw)[1] is False
    (raw / "MNIST" / "raw" / "train-images-idx3-ubyte").touch()
    assert is_row(data_row("--data", raw), True, "mnist", raw / "MNIST/raw", proc / "mnist")
    assert data_row("-m", "allcnn", "--data", raw)[1] is False
    new = data_row("-d", "digits")
    assert is_row(new, True, "digits", proc / "digits")
    whitened = data_row("-d", "digits", "--zca")
    loader.load("digits", proc=proc)
    processed = data_row("-d", "digits")
    assert is_row(processed, True, "digits", proc / "digits") and processed != new
    assert data_row("-d", "digits", "--data", raw) == processed
    assert data_row("-d", "digits", "--zca") == whitened
    (proc / "digits" / "meta.json").write_text("{")
    assert is_row(data_row("-d", "digits"), False, "digits")


# Measured costs


@pytest.mark.parametrize(("step", "sync"), [(1.0, 0.0), (1.0, 0.005), (0.02, 0.01), (1.0, 0.0101), (1e-3, 5.0)])
def test_smallest_length_keeps_sync_below_its_limit(step, sync):
    smallest = doctor.min_sync_every(step, sync)

    def fraction(length):
        return sync / (length * step + sync)

    assert smallest >= 1 and fraction(smallest) < doctor.MAX_SYNC_FRACTION
    assert smallest == 1 or fraction(smallest - 1) >= doctor.MAX_SYNC_FRACTION - 1e-12


class Network(nn.Sequential):
    """A network whose forward pass takes the given time, after a slower first one."""

    def __init__(self, milliseconds):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
        self.pauses = pairwise([0.15, *[milliseconds / 1e3] * 1000])

    def forward(self, inputs):
        time.sleep(next(self.pauses)[0])
        return super().forward(inputs)


def build(args, networks, parle=parle_gpu.Parle):
    """Return the optimizer and the replicas of these networks."""
    optimizer = parle([network.parameters() for network in networks], **doctor.SETTINGS, batches_per_epoch=3)
    data = doctor.synthetic_data(args)
    replicas = [
        experiment.build_replica(args, data, number)._replace(network=network)
        for number, network in enumerate(networks)
    ]
    return optimizer, replicas


class SlowToSync(parle_gpu.Parle):
    """Reports 7 ms more for each synchronization, and half a second for the fifth."""

    extra, syncs = 0.0, 0

    @property
    def sync_seconds(self):
        return super().sync_seconds + self.extra

    def sync(self):
        self.syncs += 1
        self.extra += 0.5 if self.syncs == 5 else 0.007
        super().sync()


def test_measures_medians_and_changes_no_weights(monkeypatch):
    monkeypatch.setattr(doctor, "MEASURE_SECONDS", 0.2)
    args = arguments("-d", "digits", "-b", 4)
    optimizer, replicas = build(args, [Network(20), Network(40)], SlowToSync)
    master = optimizer.master.clone()
    assert doctor.measure_passes(optimizer, replicas, Group(), amp=False) == pytest.approx(0.06, rel=0.5)
    assert doctor.measure_communication(optimizer, Group()) == (pytest.approx(0.007, rel=0.2), 0)
    assert torch.equal(optimizer.master, master) and optimizer.rounds_done == doctor.NUM_SYNCS
    for group in optimizer.param_groups:
        assert torch.equal(torch.nn.utils.parameters_to_vector(group["params"]), master)


@pytest.mark.parametrize("amp", [False, True])
def test_amp_is_used_while_measuring(amp, monkeypatch):
    monkeypatch.setattr(doctor, "MEASURE_SECONDS", 0.0)
    network, dtypes = Network(0), set()
    network.register_forward_hook(lambda layer, inputs, output: dtypes.add(output.dtype))
    optimizer, replicas = build(arguments("-d", "digits", "-b", 4), [network])
    doctor.measure_passes(optimizer, replicas, Group(), amp)
    assert dtypes == {torch.bfloat16 if amp else torch.float32}


# parle_gpu.py


@pytest.fixture
def main(monkeypatch, tmp_path, capsys):
    """parle_gpu.py --doctor in an empty directory, where it leaves nothing; returns its exit status and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "MEASURE_SECONDS", 0.0)
    monkeypatch.setattr(doctor, "cpu_computes_bfloat16", lambda: False)

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


def test_one_process_prints_what_is_here_and_its_cost(main):
    status, out = main("-d", "digits", "-n", 2, "-b", 8, "--device", "cpu")
    environment = ["python", "torch", "torchvision", "numpy", "data", "threads", "replica 0", "replica 1"]
    assert (status, labels(out)) == (0, [*environment, "model", "step", "messages", "L"])
    assert value(out, "torch") == torch.__version__.partition("+")[0]
    assert value(out, "replica 1") == "cpu"
    assert re.search(r"lenet\b.*\b132,220\b.*\b0\.529 MB", value(out, "model"))
    assert re.search(r"^[\d.,]+ ms\b.*\b8\b.*\b2 replicas", value(out, "step"))
    assert re.search(r"^[\d.,]+ ms\b.*\b132,220\b", value(out, "messages"))
    assert re.search(r"^\d+\b.*\b25\b.* \d+\.\d\d %", value(out, "L"))


@pytest.mark.parametrize(
    ("words", "seconds", "step", "sync", "length", "percent"),
    [
        (("-L", 1), (0.0284, 2.07e-5), "28.4 ms", "0.0207 ms", 1, "0.07"),
        (("-L", "auto"), (41.3, 0.3162), "41,300 ms", "316 ms", 10, "0.08"),
        (("--method", "elastic-sgd"), (0.1, 0.1), "100 ms", "100 ms", 1, "50.00"),
    ],
)
def test_cost_of_the_given_length_is_printed(words, seconds, step, sync, length, percent, main, monkeypatch):
    passes, communication = seconds
    monkeypatch.setattr(doctor, "measure_passes", lambda *_: passes)
    monkeypatch.setattr(doctor, "measure_communication", lambda *_: (communication, 0.0))
    status, out = main("-d", "digits", "-b", 8, *words)
    assert status == 0
    assert value(out, "step").startswith(step) and value(out, "messages").startswith(sync)
    assert re.search(rf"\b{length}\D+\b{re.escape(percent)} %", value(out, "L"))


@pytest.mark.parametrize(
    ("words", "supported", "shown"), [((), True, True), ((), False, False), (("--amp", "bf16"), True, False)]
)
def test_bfloat16_is_measured_where_the_cpu_has_it(words, supported, shown, main, monkeypatch):
    monkeypatch.setattr(doctor, "cpu_computes_bfloat16", lambda: supported)
    monkeypatch.setattr(doctor, "measure_passes", lambda *_, amp=False: 0.05 if amp else 0.1)
    monkeypatch.setattr(doctor, "measure_communication", lambda *_: (0.01, 0.0))
    status, out = main("-d", "digits", "-b", 8, "--device", "cpu", *words)
    assert status == 0 and ("bfloat16" in labels(out)) == shown
    assert not shown or re.search(r"^50 ms\b.*--amp bf16\b.*\b2\.0\b", value(out, "bfloat16"))


def test_missing_package_is_reported_and_nothing_measured(main, monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "torchvision":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    status, out = main("-d", "digits")
    assert (status, labels(out)) == (1, ["python", "torch", "torchvision", "numpy", "data"])
    assert value(out, "torchvision").endswith("pip install torchvision")


def test_missing_data_are_reported(main, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    status, out = main("--data", empty)
    assert status == 1 and "mnist" in value(out, "data") and str(empty) in value(out, "data")


# python -m parle.doctor


def test_module_prints_the_environment_alone(python, tmp_path):
    done = python("-m", "parle.doctor", "-d", "digits", "--proc", tmp_path / "proc", cwd=ROOT)
    assert (done.returncode, done.stderr, labels(done.stdout)) == (0, "", ENVIRONMENT)
    assert value(done.stdout, "python").startswith(platform.python_version())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("data", "status"), [("empty", 1), ("nowhere", 2)])
def test_module_exits_with_an_error_if_no_run_can_start(data, status, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["parle.doctor", "--data", str(tmp_path / data)])
    monkeypatch.setattr(subprocess, "run", finishes(out="MPICH 5.0.2\n"))
    with pytest.raises(SystemExit) as exit:
        doctor.main()
    out, err = capsys.readouterr()
    assert exit.value.code == status and str(tmp_path / data) in (err if status == 2 else value(out, "data"))
    assert (labels(out), err.count("\n")) == (([], 1) if status == 2 else (ENVIRONMENT, 0))


# parle_mpi.py


def finishes(status=0, out="", err=""):
    """Return a replacement of subprocess.run, which loads the MPI library in another process."""
    return lambda *_, **__: subprocess.CompletedProcess((), status, out, err)


@pytest.mark.parametrize(
    ("mpiexec", "name", "can_start"), [(None, None, False), (None, "Slurm", True), ("/m", None, True)]
)
def test_ranks_need_an_mpiexec_or_a_launcher(mpiexec, name, can_start, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(launcher, "find_mpiexec", lambda: mpiexec)
    monkeypatch.setattr(launcher, "launcher_name", lambda: name)
    monkeypatch.setattr(subprocess, "run", finishes(out="MPICH 5.0.2\n"))
    assert doctor.check_environment(arguments("-d", "digits", "--proc", tmp_path), mpi=True) is can_start
    out = capsys.readouterr().out
    assert labels(out) == ENVIRONMENT
    assert value(out, "MPI") == "MPICH 5.0.2"
    assert name is None or value(out, "launcher").startswith(name)
    assert value(out, "mpiexec") == mpiexec if mpiexec else "pip install mpich" in value(out, "mpiexec")


def test_broken_mpi_is_reported_and_no_rank_started(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(supervision, "spawn_ranks", lambda count: pytest.fail("started ranks"))

    def mpi_of_doctor():
        monkeypatch.setattr(sys, "argv", f"parle_mpi.py --doctor -n 2 -d digits --proc {tmp_path}".split())
        with pytest.raises(SystemExit) as exit:
            parle_mpi.main()
        out, err = capsys.readouterr()
        assert (exit.value.code, err, labels(out)[-1]) == (1, "", "data")
        return value(out, "MPI")

    with monkeypatch.context() as patched:  # a real process and an MPI that cannot be loaded
        (tmp_path / "mpi4py").mkdir()
        (tmp_path / "mpi4py" / "__init__.py").write_text("class rc: initialize = True\n")
        (tmp_path / "mpi4py" / "MPI.py").write_text("raise ImportError('no libmpi')\n")
        patched.setenv("PYTHONPATH", str(tmp_path))
        printed = mpi_of_doctor()
        assert "ImportError: no libmpi" in printed and printed.endswith("pip install mpich")
    with monkeypatch.context() as patched:
        patched.setattr(doctor, "MPI_TIMEOUT", 0.01)
        assert "0.01 s" in mpi_of_doctor()
    monkeypatch.setattr(subprocess, "run", finishes(-11))
    assert "-11" in mpi_of_doctor()


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
def test_launcher_is_recognized_from_the_environment(environment, name):
    assert launcher.launcher_name(environment) == name


def test_each_host_is_printed_with_its_threads(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_costs", lambda *_: [])
    run = SimpleNamespace(args=arguments("-n", 1), groups=Groups())
    hosts = [dict(name=f"node{i}", ranks=2 + i, cores=4, threads_per_rank=2 - i) for i in range(2)]
    assert doctor.report_ranks(run, torch.device("cpu"), hosts)
    out = capsys.readouterr().out
    assert "2 machines" in value(out, "ranks")
    assert re.search(r"node0\b.*\b2 per rank.*\b4 cores.*node1\b.*\b1 per rank.*\b4 cores", value(out, "threads"))
    assert doctor.report_ranks(run, torch.device("cpu"), hosts[:1])
    assert "node0" not in value(capsys.readouterr().out, "threads")


@pytest.mark.slow
def test_program_starts_its_ranks_and_the_first_prints(python, tmp_path):
    done = python(ROOT / "parle_mpi.py", "--doctor", "-n", 2, "-d", "digits", "-b", 4, cwd=tmp_path, timeout=110)
    assert (done.returncode, done.stderr) == (0, "")
    bfloat16 = ["bfloat16"] * doctor.cpu_computes_bfloat16()
    costs = ["ranks", "threads", "replica 0", "replica 1", "model", "step", *bfloat16, "allreduce", "L"]
    assert labels(done.stdout) == ENVIRONMENT + costs
    assert "rank 1" in value(done.stdout, "replica 1")
    assert re.search(r"^[\d.,]+ ms\b.*\b132,220\b.*\b2 ranks", value(done.stdout, "allreduce"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_under_a_launcher_its_ranks_are_used(python, tmp_path):
    done = python(
        ROOT / "parle_mpi.py", "--doctor", "-n", 1, "-d", "digits", "-b", 4, ranks=2, cwd=tmp_path, timeout=110
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "MPICH" in value(done.stdout, "launcher")
    assert value(done.stdout, "ranks").startswith("2 ")
    assert re.search(r"rank 0\b.*\brank 1\b", value(done.stdout, "replica 0"))
    assert re.search(r"^[\d.,]+ ms\b.* [\d.]+ %", value(done.stdout, "gradient"))
    assert len(set(labels(done.stdout))) == len(labels(done.stdout))
    assert not {"allreduce", "L"} & set(labels(done.stdout))  # a single replica has none to synchronize with
