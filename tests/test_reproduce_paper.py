import json
import math
import os
import shlex
import signal
import sys
import threading
import time

import pytest

from benchmarks import reproduce_paper as rp
from benchmarks import results
from parle import checkpoint, cli

PROGRAM = """
import json, pathlib, signal, sys
arguments = sys.argv[1:]
folder = pathlib.Path(arguments[arguments.index("--out") + 1])
folder.mkdir(parents=True, exist_ok="--resume" in arguments)
events = [{"event": "round"}, {"event": "finished", "master_error": 1.5}]
if "--resume" not in arguments:
    events = [{"event": "start", "log_version": 2, "command": sys.argv}]
with open(folder / "log.jsonl", "a") as log:
    log.writelines(json.dumps(event) + "\\n" for event in events)
if "--resume" not in arguments:
    asked = signal.sigwait({signal.SIGTERM})
    (folder / "checkpoints" / "00000001-0000").mkdir(parents=True)
    (folder / "checkpoints" / "00000001-0000" / "manifest.json").touch()
    sys.exit(75)
"""


@pytest.fixture
def empty(monkeypatch, tmp_path):
    """An empty directory of results."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def program(tmp_path):
    """A program that finishes only if it is resumed. It blocks SIGTERM from its first instruction, for sigwait."""
    path = tmp_path / "program.py"
    path.write_text("import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})" + PROGRAM)
    return path


def add_row(name, seed, error, command=None):
    command = command or shlex.join(["python", "parle_mpi.py", *rp.command_flags(rp.EXPERIMENTS[name], seed)])
    row = dict(experiment=name, seed=seed, command=command, master_error=error, machine="a machine")
    results.append_row(rp.NAME, row)


def cells():
    lines = [line.strip("| ").split(" | ") for line in rp.table().splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines[2:]}


# Experiments and table


def test_experiments_are_valid_command_lines():
    for name, experiment in rp.EXPERIMENTS.items():
        args = rp.parse(rp.command_flags(experiment, 43))
        cli.validate(args, None)
        assert name.startswith(f"{args.model}-{args.dataset}-")
        *_, subset, method = name.split("-")
        assert args.frac == {"half": 0.5, "quarter": 0.25}.get(subset, 1.0)
        assert args.method == {"entropy": "entropy-sgd", "elastic": "elastic-sgd"}.get(method, method)
        assert args.seed == 43
        assert all(drop < args.epochs for drop in args.lr_drops)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lenet-mnist-parle", 5 * 469 * 25 * 6),
        ("allcnn-cifar10-sgd", 200 * 391),
        ("allcnn-cifar10-half-parle", 10 * math.ceil(25_000 / 128) * 25 * 3),
        ("allcnn-cifar10-quarter-elastic", 200 * math.ceil(12_500 / 128) * 6),
    ],
)
def test_gradient_evaluations_count_all_replicas(name, expected):
    assert rp.gradient_evaluations(rp.EXPERIMENTS[name]) == expected


def test_table_shows_errors_and_costs_of_what_was_run(empty):
    assert all(line[1:3] == ["not run", "0"] and line[4] == "not timed" for line in cells().values())
    for seed, error in ((42, 0.5), (43, 0.54)):
        add_row("lenet-mnist-sgd", seed, error)
    other_flags = "python parle_mpi.py -m lenet -d mnist --method entropy-sgd -B 1 -s 42"
    add_row("lenet-mnist-entropy", 42, 0.5, command=other_flags)
    results.append_row(rp.NAME, dict(network="lenet", step_seconds=0.36, machine="a machine"))
    lines = cells()
    assert lines.keys() == rp.EXPERIMENTS.keys()
    assert lines["lenet-mnist-sgd"][:5] == ["0.50", "0.52 ± 0.03", "2", "11,725", "1.2"]
    assert lines["lenet-mnist-entropy"][1] == "not run"


def test_networks_are_timed_once_per_machine(empty, monkeypatch):
    assert 0 < rp.step_seconds("lenet") < 10
    timed = []
    monkeypatch.setattr(rp, "step_seconds", lambda network: timed.append(network) or 0.5)
    results.append_row(rp.NAME, dict(network="lenet", step_seconds=1.0, machine="another machine"))
    rp.time_networks()
    rp.time_networks()
    assert sorted(timed) == ["allcnn", "lenet", "wrn-16-4", "wrn-28-10"]


# Runs


def test_a_run_is_stopped_resumed_and_not_repeated(program, tmp_path):
    out = tmp_path / "runs" / "one"
    assert not rp.train(program, ["-s", "42"], out, [], seconds=1)
    with pytest.raises(SystemExit, match="different experiment"):
        rp.train(program, ["-s", "43"], out, [], seconds=1)
    assert [event["event"] for event in results.read_log(out)] == ["start"]
    assert rp.train(program, ["-s", "42"], out, [], seconds=20)
    log = out.joinpath("log.jsonl").read_text()
    assert results.read_log(out)[-1] == {"event": "finished", "master_error": 1.5}
    assert rp.train(program, ["-s", "42"], out, [], seconds=20)
    assert out.joinpath("log.jsonl").read_text() == log


def test_a_run_without_a_checkpoint_is_restarted(program, tmp_path):
    out = tmp_path / "one"
    out.mkdir()
    start = json.dumps({"event": "start", "log_version": 2, "command": ["program.py", "-s", "42"]})
    out.joinpath("log.jsonl").write_text(start + '\n{"event": "rou')
    assert rp.progress(out) == 0.0
    assert not rp.train(program, ["-s", "42"], out, [], seconds=1)
    assert len(checkpoint.list_checkpoints(out / checkpoint.FOLDER)) == 1


def test_a_failing_program_stops_the_benchmark(tmp_path):
    program = tmp_path / "failing.py"
    program.write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match="status 3"):
        rp.train(program, [], tmp_path / "one", [])


def test_sigterm_to_the_benchmark_stops_its_program(tmp_path):
    program, started = tmp_path / "slow.py", tmp_path / "pid"
    program.write_text(
        f"import os, pathlib, time; pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )

    def terminate():
        while not (started.exists() and started.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        threading.Thread(target=terminate).start()
        with pytest.raises(SystemExit) as end:
            rp.train(program, [], tmp_path / "one", [])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_progress_is_the_fraction_of_rounds_done(tmp_path):
    assert rp.progress(tmp_path) == 0.0
    events = [
        {"event": "start", "log_version": 2, "num_rounds": 40},
        {"event": "round", "round": 9},
        {"event": "round", "round": 10},
    ]
    tmp_path.joinpath("log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert rp.progress(tmp_path) == 0.25


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ([], []),
        (["--minutes", "5"], ["b", "a"]),
        (["--experiment", "a"], ["a"]),
    ],
)
def test_experiments_run_within_the_time_cheapest_first(flags, names, empty, monkeypatch, capsys):
    experiments = {
        name: rp.Experiment(1.0, f"-m lenet -d mnist --method sgd -B {epochs}", "")
        for name, epochs in (("a", 2), ("b", 1))
    }
    results.append_row(rp.NAME, dict(network="lenet", step_seconds=1.0, machine="a machine"))
    ran = []
    monkeypatch.setattr(rp, "EXPERIMENTS", experiments)
    monkeypatch.setattr(rp, "run", lambda name, *_: ran.append(name))
    monkeypatch.setattr(sys, "argv", ["reproduce_paper.py", *flags, "--seeds", "42"])
    before = signal.getsignal(signal.SIGTERM)
    rp.main()
    signal.signal(signal.SIGTERM, before)
    assert ran == names


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_resumed_experiment_has_the_error_of_an_uninterrupted_one(empty, monkeypatch, tmp_path, proc):
    flags = "-m lenet -d digits -n 2 -b 64 -B 0.5"
    monkeypatch.setattr(rp, "EXPERIMENTS", {"tiny": rp.Experiment(1.0, flags, "made up")})
    paths = ["--proc", str(proc), "--device", "cpu"]
    rp.run("tiny", 42, "parle_gpu.py", tmp_path / "uninterrupted", paths, 100)
    (uninterrupted,) = results.read_rows(rp.NAME)
    empty.joinpath("reproduce_paper.jsonl").unlink()

    calls = 0
    while not rp.finished("tiny"):
        rp.run("tiny", 42, "parle_gpu.py", tmp_path / "interrupted", paths, 4 * 1.5**calls)
        calls += 1
        assert calls < 10
    (row,) = results.read_rows(rp.NAME)
    events = [event["event"] for event in results.read_log(tmp_path / "interrupted")]
    assert "resume" in events
    assert (row["master_error"], row["images_seen"]) == (uninterrupted["master_error"], uninterrupted["images_seen"])
    assert row["command"] == f"python parle_gpu.py {flags} -s 42"
