import json
import math
import os
import shlex
import signal
import sys
import threading
import time

import pytest

import checkpoint
import options
from benchmarks import paper, record

PROGRAM = """
import json, pathlib, signal, sys
arguments = sys.argv[1:]
folder = pathlib.Path(arguments[arguments.index("--out") + 1])
folder.mkdir(parents=True, exist_ok="--resume" in arguments)
events = [{"event": "round"}, {"event": "end", "master_error": 1.5}]
if "--resume" not in arguments:
    events = [{"event": "start", "command": sys.argv}]
with open(folder / "log.jsonl", "a") as log:
    log.writelines(json.dumps(event) + "\\n" for event in events)
if "--resume" not in arguments:
    asked = signal.sigwait({signal.SIGTERM})
    (folder / "checkpoints" / "00000001-0000").mkdir(parents=True)
    (folder / "checkpoints" / "00000001-0000" / "manifest.json").touch()
    sys.exit(75)
"""


@pytest.fixture
def results(monkeypatch, tmp_path):
    """A folder where no row has been kept yet."""
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def program(tmp_path):
    """A program that never ends unless it is resumed. It blocks SIGTERM from its first instruction, for sigwait."""
    path = tmp_path / "program.py"
    path.write_text("import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})" + PROGRAM)
    return path


def keep(name, seed, error, command=None):
    typed = command or shlex.join(["python", "parle_mpi.py", *paper.flags(paper.ROWS[name], seed)])
    record.keep("paper", dict(row=name, seed=seed, command=typed, master_error=error, machine="a machine"))


def cells():
    lines = [line.strip("| ").split(" | ") for line in paper.table().splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines[2:]}


# Rows


@pytest.mark.parametrize("name", paper.ROWS)
def test_a_row_is_a_command_line_of_the_programs(name):
    row = paper.ROWS[name]
    args = paper.resolved(paper.flags(row, 43))
    options.check(args, None)
    assert name.startswith(f"{args.model}-{args.dataset}-")
    *_, share, method = name.split("-")
    assert args.frac == {"half": 0.5, "quarter": 0.25}.get(share, 1.0)
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
def test_mini_batches_are_those_of_all_replicas(name, expected):
    assert paper.mini_batches(paper.ROWS[name]) == expected


# The table


def test_a_row_that_has_not_been_run_says_so(results):
    assert cells().keys() == paper.ROWS.keys()
    assert all(line[1:3] == ["not run", "0"] and line[4] == "not timed" for line in cells().values())


def test_the_table_has_mean_and_deviation_over_the_seeds_that_have_run(results):
    for seed, error in ((42, 0.5), (43, 0.54)):
        keep("lenet-mnist-sgd", seed, error)
    keep("lenet-mnist-parle", 44, 0.47)
    lines = cells()
    assert lines["lenet-mnist-sgd"][:3] == ["0.50", "0.52 ± 0.03", "2"]
    assert lines["lenet-mnist-parle"][:3] == ["0.44", "0.47", "1"]
    assert lines["lenet-mnist-elastic"][1] == "not run"


def test_what_was_run_with_other_flags_does_not_count(results):
    keep("lenet-mnist-sgd", 42, 0.5, command="python parle_mpi.py -m lenet -d mnist --method sgd -B 1 -s 42")
    assert cells()["lenet-mnist-sgd"][1] == "not run"


def test_core_hours_are_mini_batches_times_the_newest_time_of_one(results):
    for seconds in (1.0, 0.25):
        record.keep("paper", dict(network="wrn-28-10", mini_batch_seconds=seconds, machine="a machine"))
    lines = cells()
    assert lines["wrn-28-10-cifar10-parle"][4] == f"{5 * 391 * 25 * 3 * 0.25 / 3600:.1f}"
    assert lines["lenet-mnist-sgd"][4] == "not timed"
    assert "- wrn-28-10: 0.25 s on a machine" in paper.table()


def test_a_network_is_timed_once_on_a_machine(results, monkeypatch):
    timed = []
    monkeypatch.setattr(paper, "mini_batch_seconds", lambda network: timed.append(network) or 0.5)
    record.keep("paper", dict(network="lenet", mini_batch_seconds=1.0, machine="another one"))
    paper.time_networks()
    paper.time_networks()
    assert sorted(timed) == ["allcnn", "lenet", "wrn-16-4", "wrn-28-10"]


def test_a_mini_batch_takes_time():
    assert 0 < paper.mini_batch_seconds("lenet") < 10


# Runs


def test_a_run_is_stopped_when_its_time_is_over_and_goes_on_when_called_again(program, tmp_path):
    folder = tmp_path / "runs" / "one"
    assert not paper.train(program, ["-s", "42"], folder, [], seconds=1)
    assert [event["event"] for event in record.log(folder)] == ["start"]
    assert paper.train(program, ["-s", "42"], folder, [], seconds=20)
    log = folder.joinpath("log.jsonl").read_text()
    assert record.log(folder)[-1] == {"event": "end", "master_error": 1.5}
    assert paper.train(program, ["-s", "42"], folder, [], seconds=20)
    assert folder.joinpath("log.jsonl").read_text() == log  # not run again


def test_what_broke_off_before_its_first_checkpoint_begins_anew(program, tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    folder.joinpath("log.jsonl").write_text(
        json.dumps({"event": "start", "command": ["program.py", "-s", "42"]}) + "\n"
    )
    assert not paper.train(program, ["-s", "42"], folder, [], seconds=1)
    assert len(checkpoint.found(folder / checkpoint.FOLDER)) == 1


def test_a_folder_of_another_experiment_is_left_alone(program, tmp_path):
    folder = tmp_path / "one"
    paper.train(program, ["-s", "42"], folder, [], seconds=1)
    with pytest.raises(SystemExit, match="another experiment"):
        paper.train(program, ["-s", "43"], folder, [], seconds=1)
    assert len(checkpoint.found(folder / checkpoint.FOLDER)) == 1


def test_a_program_that_fails_ends_the_benchmark(tmp_path):
    failing = tmp_path / "failing.py"
    failing.write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match="status 3"):
        paper.train(failing, [], tmp_path / "one", [])


def test_a_log_that_was_cut_in_mid_line_is_gone_on_with(program, tmp_path):
    folder = tmp_path / "one"
    assert not paper.train(program, [], folder, [], seconds=1)
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"event": "rou')
    assert paper.done(folder) == 0.0
    assert paper.train(program, [], folder, [], seconds=20) is True


def test_what_is_stopped_before_it_has_begun_is_no_failure(tmp_path):
    """As while it reads its data, when SIGTERM ends it in the ordinary way."""
    program = tmp_path / "slow.py"
    program.write_text("import time; time.sleep(60)")
    assert paper.train(program, [], tmp_path / "one", [], seconds=0.5) is False


def test_the_run_ends_with_the_benchmark(tmp_path):
    program, started = tmp_path / "slow.py", tmp_path / "pid"
    program.write_text(
        f"import os, pathlib, time; pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )

    def ask():
        while not (started.exists() and started.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        threading.Thread(target=ask).start()
        with pytest.raises(SystemExit) as end:
            paper.train(program, [], tmp_path / "one", [])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_how_much_of_a_run_is_done(tmp_path):
    assert paper.done(tmp_path) == 0.0
    events = [{"event": "start", "rounds": 40}, {"event": "round", "round": 9}, {"event": "round", "round": 10}]
    tmp_path.joinpath("log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert paper.done(tmp_path) == 0.25


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ([], []),
        (["--minutes", "5"], ["b", "a"]),
        (["--row", "a"], ["a"]),
    ],
)
def test_rows_are_run_as_time_is_given_the_cheapest_first(typed, names, results, monkeypatch, capsys):
    rows = {
        name: paper.Row(1.0, f"-m lenet -d mnist --method sgd -B {epochs}", "") for name, epochs in (("a", 2), ("b", 1))
    }
    record.keep("paper", dict(network="lenet", mini_batch_seconds=1.0, machine="a machine"))
    ran = []
    monkeypatch.setattr(paper, "ROWS", rows)
    monkeypatch.setattr(paper, "run", lambda name, *_: ran.append(name))
    monkeypatch.setattr(sys, "argv", ["paper.py", *typed, "--seeds", "42"])
    before = signal.getsignal(signal.SIGTERM)
    paper.main()
    signal.signal(signal.SIGTERM, before)
    assert ran == names


@pytest.mark.slow
def test_a_row_that_is_stopped_and_resumed_has_the_error_of_one_that_is_not(results, monkeypatch, tmp_path, proc):
    flags = "-m lenet -d digits -n 2 -b 64 -B 1"
    monkeypatch.setattr(paper, "ROWS", {"tiny": paper.Row(1.0, flags, "made up")})
    where = ["--proc", str(proc), "--device", "cpu"]
    paper.run("tiny", 42, "parle_gpu.py", tmp_path / "whole", where, 100)
    (whole,) = record.read("paper")
    results.joinpath("paper.jsonl").unlink()

    calls = 0
    while not paper.kept("tiny"):
        paper.run("tiny", 42, "parle_gpu.py", tmp_path / "parts", where, 10)
        calls += 1
        assert calls < 20
    (row,) = record.read("paper")
    events = [event["event"] for event in record.log(tmp_path / "parts")]
    assert events.count("resume") == calls - 1 > 0
    assert (row["master_error"], row["images"]) == (whole["master_error"], whole["images"])
    assert row["command"] == f"python parle_gpu.py {flags} -s 42"
