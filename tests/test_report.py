import json
import os
import platform
import re
import resource
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
import torch
from torch import nn

import launch
import report

LABEL = "lenet on mnist"
START = {
    "event": "start",
    "arguments": {"method": "parle", "batch_size": 128, "epochs": 0.5, "out": "runs/x", "lr_drops": []},
    "dataset": "mnist",
    "origin": None,
    "replicas": 3,
    "sync_every": 25,
    "parameters": 132220,
    "images": 60000,
    "batches_per_epoch": 24,
    "rounds": 12,
    "ranks": 6,
    "threads": 2,
    "devices": ["cuda:1", "cuda:0", "cuda:1"] * 2,
}
HERE = {name: value for name, value in START.items() if name != "ranks"} | {"devices": START["devices"][:3]}
RESUME = START | {"event": "resume", "round": 7, "checkpoint": "runs/x/checkpoints/00000007-0000", "changes": {}}
STOP = {"event": "stop", "round": 7, "command": "python parle_gpu.py --resume runs/x"}
EVAL = {
    "event": "eval",
    "round": 12,
    "epoch": 0.5,
    "seconds": 60.0,
    "master_loss": 0.01234567,
    "master_error": 0.4567,
    "replica_errors": [0.5, 0.555, 10.0 / 16],
    "ensemble_error": 0.4449,
    "distances": [0.12345, 0.25, 0.5],
}
AVERAGED = {
    "averaged_master_error": 0.5678,
    "averaged_replica_errors": [0.625, float("nan"), 10.0],
    "averaged_ensemble_error": 98.7654,
}
END = {
    "event": "end",
    "seconds": 60.0,
    "wall_seconds": 66.0,
    "master_error": 0.4567,
    "best_master_error": 0.4321,
    "sync_seconds": 4.5,
    "wait_seconds": 3.0,
    "images": 60000,
}


def round_event(number, seconds, **other):
    event = {"event": "round", "round": number, "epoch": number / 24, "seconds": seconds}
    figures = {"loss": 0.25, "error": 7.125, "lr": 0.1, "gamma": 0.01, "rho": 0.01, "spread": 0.5}
    return event | figures | {"sync_seconds": 0.01, "images_per_second": 1234.5} | other


def events():
    return [START, *(round_event(k, float(k)) for k in range(1, 13)), EVAL, END]


@pytest.fixture
def tell(tmp_path, monkeypatch):
    monkeypatch.delenv(launch.TERMINAL, raising=False)
    return report.Report(tmp_path / "runs" / "one", LABEL)


def test_the_log_holds_each_event_at_once(tell):
    fed = []
    for event in events():
        tell(event)
        fed.append(event)
        lines = tell.log.read_text().splitlines()
        assert [json.loads(line) for line in lines] == fed
    assert tell.log.name == "log.jsonl"
    assert {event["event"] for event in fed} == {"start", "round", "eval", "end"}


def test_the_log_of_a_diverged_run_is_json(tell):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    tell(START)
    tell(round_event(1, 1.0, loss=float("nan"), spread=float("inf")))
    assert json.loads(tell.log.read_text().splitlines()[1], parse_constant=refuse)["event"] == "round"


def test_every_line_says_what_is_trained_on_what(tell, capsys):
    for event in events():
        tell(event)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) > 10
    assert all(line.startswith(f"{LABEL}  ") for line in out.splitlines())
    assert err == ""


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "parle: 3 replicas on 6 ranks, 2 threads each, 2 on cuda:0, 4 on cuda:1\n"),
        ({}, "132,220 parameters, 60,000 images; 12 rounds of 25 mini-batches of 128, 24 rounds an epoch; in "),
        (dict(rounds=1, sync_every=1), "60,000 images; 1 round of 1 mini-batch of 128, 24 rounds an epoch; in "),
        (dict(sync_every="auto"), "12 rounds of auto mini-batches of 128, 24 rounds an epoch; in "),
        (dict(origin="/data"), "60,000 images from /data; 12 rounds"),
        (dict(devices=["cuda:0"] * 6), "parle: 3 replicas on 6 ranks, 2 threads each, cuda:0\n"),
        (dict(replicas=1, ranks=1, threads=1, devices=["cpu"]), "parle: 1 replica on 1 rank, 1 thread each, cpu\n"),
    ],
)
def test_the_start_says_what_will_run_where(changed, words, tell, capsys):
    tell(START | changed)
    out = capsys.readouterr().out
    assert words in out
    assert str(tell.folder) in out


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "parle: 3 replicas in one process, 2 threads, 1 on cuda:0, 2 on cuda:1\n"),
        (dict(replicas=1, threads=1, devices=["cpu"]), "parle: 1 replica in one process, 1 thread, cpu\n"),
        (dict(devices=["cuda:0 + cuda:1"] * 3), "parle: 3 replicas in one process, 2 threads, cuda:0 + cuda:1\n"),
        (dict(devices=["cpu"] * 3, idle=[]), "parle: 3 replicas in one process, 2 threads, cpu\n"),
        (
            dict(devices=["cuda:0"] * 3, idle=["cuda:1"]),
            "parle: 3 replicas in one process, 2 threads, cuda:0; idle: cuda:1\n",
        ),
        (
            dict(idle=["cuda:2", "cuda:3"]),
            "parle: 3 replicas in one process, 2 threads, 1 on cuda:0, 2 on cuda:1; idle: cuda:2, cuda:3\n",
        ),
    ],
)
def test_one_process_says_that_it_is_one_and_what_it_leaves_idle(changed, words, tell, capsys):
    tell(HERE | changed)
    assert capsys.readouterr().out.startswith(f"{LABEL}  {words}")


@pytest.mark.parametrize(
    ("seconds", "printed"),
    [
        (range(1, 13), [1, 6, 11, 12]),
        ([0.1, 0.2, 0.3], [1, 3]),
        ([2.0, 6.9, 7.0, 7.1], [1, 3, 4]),
        ([10.0, 20.0, 30.0], [1, 2, 3]),
    ],
)
def test_rounds_print_every_5_seconds_and_at_the_end(seconds, printed, tell, capsys):
    tell(START | {"rounds": len(seconds)})
    for number, second in enumerate(seconds, 1):
        tell(round_event(number, second))
    rounds = re.findall(r"round +(\d+)/(\d+)", capsys.readouterr().out)
    assert rounds == [(str(number), str(len(seconds))) for number in printed]


def test_a_round_line_tells_the_figures_and_the_time_left(tell, capsys):
    tell(START | {"rounds": 24})
    capsys.readouterr()
    tell(round_event(6, 30.0))
    line = f"{LABEL}  round  6/24  epoch 0.25  loss 0.2500  error  7.12 %  1,234 images/s  1:30 left\n"
    assert capsys.readouterr().out == line


def test_an_evaluation_shows_master_replicas_and_ensemble(tell, capsys):
    tell(EVAL)
    shown = "epoch 0.50  test error: master 0.46 %  replicas 0.50 0.56 0.62 %  ensemble 0.44 %\n"
    assert capsys.readouterr().out == f"{LABEL}  {shown}"


def test_the_end_shows_a_table_of_errors(tell, capsys):
    tell(START)
    tell(EVAL)
    capsys.readouterr()
    tell(END)
    out = capsys.readouterr().out
    rows = re.findall(rf"^{LABEL} +(master|replica \d|ensemble) +(\d+\.\d\d) %   (.+)$", out, re.M)
    away = "of the master's norm away from it"
    assert rows == [
        ("master", "0.46", "loss 0.0123, best 0.43 %"),
        ("replica 0", "0.50", f"0.1235 {away}"),
        ("replica 1", "0.56", f"0.2500 {away}"),
        ("replica 2", "0.62", f"0.5000 {away}"),
        ("ensemble", "0.44", "of the replicas' probabilities"),
    ]
    time, place = out.splitlines()[-2:]
    assert "60.0 s of training, 1,000 images/s; 2.50 % of it synchronizing, 5.0 % waiting for the slowest rank" in time
    assert place == f"{LABEL}  log and master in {tell.folder}"


def test_the_end_shows_errors_by_both_kinds_of_batch_norm_statistics(tell, capsys):
    tell(START)
    tell(EVAL | AVERAGED)
    capsys.readouterr()
    tell(END)
    lines = [line.removeprefix(f"{LABEL}  ") for line in capsys.readouterr().out.splitlines()]
    assert lines[:6] == [
        "test error  recalibrated      averaged   batch-norm statistics",
        "  master          0.46 %        0.57 %   loss 0.0123, best 0.43 %",
        "  replica 0       0.50 %        0.62 %   0.1235 of the master's norm away from it",
        "  replica 1       0.56 %         nan %   0.2500 of the master's norm away from it",
        "  replica 2       0.62 %       10.00 %   0.5000 of the master's norm away from it",
        "  ensemble        0.44 %       98.77 %   of the replicas' probabilities",
    ]
    logged = json.loads(tell.log.read_text().splitlines()[1])
    assert logged["averaged_replica_errors"] == [0.625, None, 10.0]


def test_one_process_waits_for_no_rank(tell, capsys):
    for event in (HERE, EVAL, END | dict(wait_seconds=0.0)):
        tell(event)
    time = capsys.readouterr().out.splitlines()[-2]
    assert time == f"{LABEL}  60.0 s of training, 1,000 images/s; 7.50 % of it synchronizing"


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            {"event": "lost", "round": 7, "replicas": [1]},
            "WARNING: NaN or infinity in replica 1 in round 7: restarted from the master",
        ),
        (
            {"event": "lost", "round": 7, "replicas": [0, 2]},
            "WARNING: NaN or infinity in replica 0, replica 2 in round 7: restarted from the master",
        ),
        (
            {"event": "checkpoint", "round": 7, "error": "No space left on device"},
            "WARNING: no checkpoint of round 7: No space left on device",
        ),
        (STOP, "stopped in round 8; go on with: python parle_gpu.py --resume runs/x"),
    ],
)
def test_what_happens_to_a_run_is_one_line(event, line, tell, capsys):
    tell(START)
    capsys.readouterr()
    tell(event)
    assert tuple(capsys.readouterr()) == (f"{LABEL}  {line}\n", "")
    assert json.loads(tell.log.read_text().splitlines()[-1]) == event


@pytest.mark.parametrize(
    ("changes", "words"),
    [({}, ""), ({"lr": (0.1, 0.2), "lr_drops": ([2], [])}, "; lr is 0.2, was 0.1; lr_drops is [], was [2]")],
)
def test_a_run_that_goes_on_says_where_and_what_is_new(changes, words, tell, capsys):
    tell(START)
    usual = capsys.readouterr().out
    tell(RESUME | dict(changes=changes))
    line = f"resumed in round 8 from runs/x/checkpoints/00000007-0000{words}"
    assert tuple(capsys.readouterr()) == (f"{usual}{LABEL}  {line}\n", "")
    tell(round_event(8, 60.0))
    assert "round  8/12" in capsys.readouterr().out


@pytest.mark.parametrize(("lines", "more"), [(0, 0), (2, 0), (4, 0), (4, 1000)])
def test_a_run_that_goes_on_keeps_the_log_of_what_it_does_not_repeat(lines, more, tmp_path):
    stopped = report.Report(tmp_path, LABEL)
    for event in events()[:4]:
        stopped(event)
    written = stopped.log.read_text().splitlines(keepends=True)
    del stopped
    again = report.Report(tmp_path, LABEL, len("".join(written[:lines])) + more)
    assert again.log.read_text().splitlines(keepends=True) == written[:lines]
    again(RESUME)
    assert [json.loads(line)["event"] for line in again.log.read_text().splitlines()[lines:]] == ["resume"]


def test_a_run_that_goes_on_without_its_log_begins_another(tmp_path):
    again = report.Report(tmp_path, LABEL, 1000)
    again(RESUME)
    assert json.loads(again.log.read_text()) == RESUME


def test_a_line_that_cannot_be_written_is_missing_and_told(tell, capsys):
    tell(START)
    before = tell.log.read_bytes()
    capsys.readouterr()
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, usual[1]))  # a disk with room for ten bytes
    try:
        tell(EVAL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    out, err = capsys.readouterr()
    warning, line = out.splitlines()
    assert warning.startswith(f"{LABEL}  WARNING: a line is missing from {tell.log}: ") and "File too large" in warning
    assert "test error: master 0.46 %" in line and err == ""
    assert tell.log.read_bytes() == before
    tell(END)
    assert [json.loads(line) for line in tell.log.read_text().splitlines()] == [START, END]


def test_a_second_run_in_the_same_folder_leaves_the_first_as_it_was(tell):
    tell(START)
    before = tell.log.read_bytes()
    with pytest.raises(FileExistsError, match=re.escape(str(tell.log))):
        report.Report(tell.folder, LABEL)
    assert tell.log.read_bytes() == before


def test_a_second_run_in_the_same_folder_goes_on_only_once_the_first_has_ended(tmp_path):
    first = report.Report(tmp_path, LABEL)
    first(START)
    before = first.log.read_bytes()
    for log_bytes in (0, len(before)):
        with pytest.raises(FileExistsError, match=re.escape(f"another run is writing {tmp_path / 'log.jsonl'}")):
            report.Report(tmp_path, LABEL, log_bytes)
        assert first.log.read_bytes() == before
    first(EVAL)
    before = first.log.read_bytes()
    del first
    second = report.Report(tmp_path, LABEL, len(before))
    second(RESUME)
    assert second.log.read_bytes().startswith(before)


def closed_pipe():
    reads, writes = os.pipe()
    os.close(reads)
    return os.fdopen(writes, "w")


OUTPUTS = {"full": lambda: open("/dev/full", "w"), "a pipe that nobody reads": closed_pipe}  # noqa: SIM115


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("terminal", [False, True])
def test_an_output_that_takes_nothing_does_not_end_a_run(output, terminal, tell, monkeypatch):
    if terminal:
        monkeypatch.setenv(launch.TERMINAL, "100")
    with OUTPUTS[output]() as file:
        monkeypatch.setattr(sys, "stdout", file)
        for event in events():
            tell(event)
        monkeypatch.undo()
    assert [json.loads(line) for line in tell.log.read_text().splitlines()] == events()


def test_an_output_that_was_closed_from_the_start_does_not_end_a_run(tell, monkeypatch):
    """As by `>&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    for event in events():
        tell(event)
    monkeypatch.undo()
    assert [json.loads(line) for line in tell.log.read_text().splitlines()] == events()


def test_a_folder_that_is_there_already_is_used(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    report.Report(tmp_path, LABEL)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "log.jsonl"}


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        report.Report(tmp_path / "file" / "run", LABEL)


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)


def test_the_saved_master_is_a_plain_state_dict(tell, model):
    tell.save_master(model)
    saved = torch.load(tell.folder / "master.pt", weights_only=True)
    torch.testing.assert_close(saved, dict(model.state_dict()), rtol=0, atol=0)
    assert {path.name for path in tell.folder.iterdir()} == {"log.jsonl", "master.pt"}


def test_the_master_is_replaced_by_a_later_one(tell, model):
    tell.save_master(model)
    nn.init.ones_(model[0].weight)
    tell.save_master(model)
    assert torch.load(tell.folder / "master.pt", weights_only=True)["0.weight"].eq(1).all()


def test_the_master_is_synced_then_renamed(tell, model, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    tell.save_master(model)
    assert calls == ["fsync", "replace"]


def test_a_failure_while_saving_is_told_and_leaves_the_old_master(tell, model, monkeypatch, capsys):
    tell.save_master(model)
    before = (tell.folder / "master.pt").read_bytes()

    def save(state, file):
        file.write(before[: len(before) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", save)
    tell.save_master(model)
    assert "WARNING" in capsys.readouterr().out
    assert (tell.folder / "master.pt").read_bytes() == before


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_mean", "1.running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_master_that_is_not_finite_leaves_the_old_one_and_is_told(tell, model, name, value, capsys):
    tell.save_master(model)
    before = (tell.folder / "master.pt").read_bytes()
    model.state_dict()[name][-1] = value
    capsys.readouterr()
    tell.save_master(model)
    line = f"{LABEL}  WARNING: {tell.folder}/master.pt is not the newest master: that one has NaN or infinity\n"
    assert tuple(capsys.readouterr()) == (line, "")
    assert (tell.folder / "master.pt").read_bytes() == before
    assert {path.name for path in tell.folder.iterdir()} == {"log.jsonl", "master.pt"}


def test_surroundings_say_when_what_and_where(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["parle_mpi.py", "-n", "3"])
    found = report.surroundings()
    assert found.keys() == {*("time", "command", "python", "torch", "torchvision", "numpy", "machine", "revision")}
    assert abs(datetime.strptime(found["time"], "%Y-%m-%dT%H:%M:%S%z") - datetime.now(UTC)) < timedelta(minutes=1)
    assert found["command"] == ["parle_mpi.py", "-n", "3"]
    assert (found["python"], found["torch"]) == (platform.python_version(), torch.__version__)
    assert platform.machine() in found["machine"]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (None, "{commit}"),
        ("README.md", "{commit}"),
        ("parle.py", "{commit}-dirty"),
    ],
)
def test_the_revision_is_a_commit_and_whether_a_program_differs_from_it(changed, expected, tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True, text=True)

    git("init", "-q")
    for name in ("README.md", "parle.py"):
        (tmp_path / name).write_text("before")
    git("add", ".")
    git("commit", "-qm", "all")
    if changed:
        (tmp_path / changed).write_text("after")
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    assert report.revision() == expected.format(commit=git("rev-parse", "HEAD").stdout.strip())


@pytest.mark.parametrize(
    "git",
    [
        lambda command: subprocess.CompletedProcess(command, 128, "", "fatal: not a git repository"),
        FileNotFoundError(2, "No such file or directory", "git"),
        subprocess.TimeoutExpired("git", 10),
    ],
    ids=["no repository", "no git", "hangs"],
)
def test_without_git_there_is_no_revision(git, monkeypatch):
    def run(command, **options):
        assert command[0] == "git"
        assert options["timeout"] <= 10
        if isinstance(git, Exception):
            raise git
        return git(command)

    monkeypatch.setattr(subprocess, "run", run)
    assert report.revision() is None


@pytest.mark.parametrize("told", [True, False])
def test_on_a_terminal_a_bar_stands_for_the_round_lines(told, tell, monkeypatch, capsys):
    if told:
        monkeypatch.setenv(launch.TERMINAL, "100")
    else:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for event in events():
        tell(event)
    out, err = capsys.readouterr()
    assert not err and not re.search(r"round +\d+/\d+", out)
    assert "test error: master 0.46 %" in out
    lines = [line for line in re.split(r"[\r\n]", out) if line.strip()]
    assert all(line.startswith(LABEL) for line in lines)
    bars = [line for line in lines if "|" in line]
    assert "12/12" in bars[-1] and lines.index(bars[-1]) < lines.index(next(x for x in lines if "  master  " in x))
    if told:
        assert max(map(len, bars)) <= 100


def test_the_bar_of_a_run_that_goes_on_starts_where_it_was_and_ends_where_it_stops(tell, monkeypatch, capsys):
    monkeypatch.setenv(launch.TERMINAL, "100")
    for event in (RESUME, STOP):
        tell(event)
    out = capsys.readouterr().out
    bars = [line for line in re.split(r"[\r\n]", out) if "|" in line]
    assert "7/12" in bars[0] and "7/12" in bars[-1]
    assert out.splitlines()[-1].startswith(f"{LABEL}  stopped in round 8; ")


@pytest.mark.parametrize("begin", [START, RESUME])
def test_the_bar_tells_the_time_left_from_what_this_process_has_done(begin, tell, monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setenv(launch.TERMINAL, "150")
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    tell(begin)
    first = begin.get("round", 0) + 1
    for number in range(first, first + 3):
        now[0] += 70.0
        tell(round_event(number, 1.0))
    tell(STOP)
    *_, bar = (line for line in re.split(r"[\r\n]+", capsys.readouterr().out) if "|" in line)
    minutes, seconds = divmod(70 * (12 - first - 2), 60)
    assert f"| {first + 2}/12, {minutes:02}:{seconds:02} left, loss 0.2500  error  7.12 %" in bar


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0:00"),
        (9.4, "0:09"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599, "59:59"),
        (3599.6, "1:00:00"),
        (3661, "1:01:01"),
        (360000, "100:00:00"),
    ],
)
def test_clock(seconds, shown):
    assert report._clock(seconds) == shown


@pytest.mark.parametrize("last", [STOP, "the end"])
def test_a_run_that_has_ended_lets_another_go_on_at_once(tmp_path, last):
    first = report.Report(tmp_path, LABEL)
    for event in events() if last == "the end" else [START, last]:
        first(event)
    report.Report(tmp_path, LABEL, 0)
    assert first.log.exists()
