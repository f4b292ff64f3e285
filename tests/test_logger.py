import errno
import fcntl
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

from parle import supervision
from parle.logger import LOG_VERSION, RunLogger, environment_info, revision

START = {
    "event": "start",
    "log_version": LOG_VERSION,
    "arguments": {
        "model": "lenet",
        "method": "parle",
        "batch_size": 128,
        "epochs": 0.5,
        "lr_drops": [],
        "data": None,
        "proc": "there/proc",
        "on_nan": "restart",
    },
    "dataset": "mnist",
    "source_dir": None,
    "num_replicas": 3,
    "sync_every": 25,
    "num_parameters": 132220,
    "num_train_images": 60000,
    "batches_per_epoch": 24,
    "num_rounds": 12,
    "num_ranks": 6,
    "threads_per_rank": 2,
    "hosts": [dict(name="node1", ranks=6, cores=12, threads_per_rank=2)],
    "devices": ["cuda:1", "cuda:0", "cuda:1"] * 2,
}
ONE_PROCESS = {name: value for name, value in START.items() if name not in ("num_ranks", "hosts")} | {
    "devices": START["devices"][:3]
}
RESUME = START | {"event": "resume", "round": 7, "checkpoint": "runs/x/checkpoints/00000007-0000", "changes": {}}
INTERRUPTED = {"event": "interrupted", "round": 7, "resume_command": "python parle_gpu.py --resume runs/x"}
EVAL = {
    "event": "eval",
    "round": 12,
    "epoch": 0.5,
    "train_seconds": 60.0,
    "master_loss": 0.01234567,
    "master_error": 0.4567,
    "replica_errors": [0.5, 0.555, 10.0 / 16],
    "ensemble_error": 0.4449,
    "replica_distances": [0.12345, 0.25, 0.5],
}
RUNNING_STATS = {
    "running_stats_master_error": 0.5678,
    "running_stats_replica_errors": [0.625, float("nan"), 10.0],
    "running_stats_ensemble_error": 98.7654,
}
FINISHED = {
    "event": "finished",
    "train_seconds": 60.0,
    "wall_seconds": 66.0,
    "master_error": 0.4567,
    "best_master_error": 0.4321,
    "sync_seconds": 4.5,
    "straggler_seconds": 3.0,
    "images_seen": 60000,
}


def round_event(number, seconds, **other):
    event = {"event": "round", "round": number, "epoch": number / 24, "train_seconds": seconds}
    event |= {"train_loss": 0.25, "train_error": 7.125, "lr": 0.1, "gamma_k": 0.01, "coupling_k": 0.01}
    return event | {"replica_distance_rms": 0.5, "sync_seconds": 0.01, "images_per_second": 1234.5} | other


def mentions(text, *patterns):
    """Return whether these patterns occur in this order."""
    return re.search(".*".join(patterns), text, re.DOTALL) is not None


def events():
    return [START, *(round_event(k, float(k)) for k in range(1, 13)), EVAL, FINISHED]


@pytest.fixture
def logger(tmp_path, monkeypatch):
    monkeypatch.delenv(supervision.TERMINAL_WIDTH, raising=False)
    return RunLogger(tmp_path / "runs" / "one")


def test_each_event_is_logged_at_once(logger):
    fed = []
    for event in events():
        logger(event)
        fed.append(event)
        lines = logger.log.read_text().splitlines()
        assert [json.loads(line) for line in lines] == fed
    assert logger.log.name == "log.jsonl"
    assert {event["event"] for event in fed} == {"start", "round", "eval", "finished"}


def test_the_log_of_a_diverged_run_is_valid_json(logger):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    logger(START)
    logger(round_event(1, 1.0, train_loss=float("nan"), replica_distance_rms=float("inf")))
    assert json.loads(logger.log.read_text().splitlines()[1], parse_constant=refuse)["event"] == "round"


def test_everything_is_printed_to_stdout(logger, capsys):
    for event in events():
        logger(event)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) > 10 and "lenet on mnist" in out
    assert err == ""


@pytest.mark.parametrize(
    ("changed", "patterns"),
    [
        ({}, ["parle", "3 replicas", "6 ranks", r"2 threads\b", "2 on cuda:0, 4 on cuda:1"]),
        ({}, ["132,220", "60,000", r"\b128\b", "12 rounds", r"\b25 steps\b", r"\b24\b"]),
        (dict(num_rounds=1, sync_every=1), ["60,000", r"\b128\b", r"\b1 round\b", r"\b1 step\b"]),
        (dict(sync_every="auto"), ["128", "12 rounds", "auto"]),
        ({}, ["60,000", "there/proc/raw", "12 rounds"]),
        (dict(source_dir="/old"), ["60,000", "/old", "earlier", "12 rounds"]),
        (dict(source_dir="/data", arguments=START["arguments"] | {"data": "/data"}), ["/data; batch size"]),
        (dict(devices=["cuda:0"] * 6), ["6 ranks", "cuda:0"]),
        (
            dict(num_replicas=1, num_ranks=1, hosts=[dict(name="node1", threads_per_rank=1)], devices=["cpu"]),
            [r"1 replica\b", r"1 rank\b", r"1 thread\b", "cpu"],
        ),
        (
            dict(hosts=[dict(name=f"node{i}", threads_per_rank=threads) for i, threads in enumerate((2, 3, 2))]),
            ["6 ranks", r"2 threads\b.*node0, node2\b", r"3 threads\b.*node1\b", "cuda:0"],
        ),
        (dict(hosts=[dict(name="node1", threads_per_rank=3)] * 2), [r"6 ranks \(3 threads each\)"]),
    ],
)
def test_start_is_printed_with_counts_and_devices(changed, patterns, logger, capsys):
    logger(START | changed)
    out = capsys.readouterr().out
    assert mentions(out, "lenet on mnist", *patterns)
    assert str(logger.folder) in out


@pytest.mark.parametrize(
    ("changed", "patterns", "idle"),
    [
        ({}, ["3 replicas", "2 threads", "1 on cuda:0, 2 on cuda:1"], ""),
        (dict(num_replicas=1, threads_per_rank=1, devices=["cpu"]), [r"1 replica\b", r"1 thread\b", "cpu"], ""),
        (dict(devices=["cuda:0 + cuda:1"] * 3), [r"cuda:0 \+ cuda:1"], ""),
        (dict(devices=["cpu"] * 3, idle_devices=[]), ["cpu"], ""),
        (dict(idle_devices=["cuda:2", "cuda:3"]), ["2 on cuda:1"], "cuda:2, cuda:3"),
    ],
)
def test_start_in_one_process_prints_idle_devices(changed, patterns, idle, logger, capsys):
    logger(ONE_PROCESS | changed)
    line = capsys.readouterr().out.splitlines()[0]
    assert mentions(line, "parle", *patterns, idle)
    assert "rank" not in line and ("idle" in line) == bool(idle)


@pytest.mark.parametrize(
    ("seconds", "printed"),
    [
        (range(1, 13), [1, 6, 11, 12]),
        ([0.1, 0.2, 0.3], [1, 3]),
        ([2.0, 6.9, 7.0, 7.1], [1, 3, 4]),
        ([10.0, 20.0, 30.0], [1, 2, 3]),
    ],
)
def test_rounds_are_printed_every_5_seconds_and_at_the_end(seconds, printed, logger, capsys):
    logger(START | {"num_rounds": len(seconds)})
    for number, second in enumerate(seconds, 1):
        logger(round_event(number, second))
    rounds = re.findall(r"round +(\d+)/(\d+)", capsys.readouterr().out)
    assert rounds == [(str(number), str(len(seconds))) for number in printed]


@pytest.mark.parametrize(
    ("seconds", "left"),
    [(9.4, "0:09"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (3599.6, "1:00:00"), (3661, "1:01:01")],
)
def test_round_line_has_numbers_and_the_time_left(seconds, left, logger, capsys):
    logger(START)
    capsys.readouterr()
    logger(round_event(6, seconds))
    (line,) = capsys.readouterr().out.splitlines()
    numbers = [r"epoch 0\.25 \(6\.2 passes\)", r"0\.2500\b", r"\b7\.12 %", r"\b1,234\b", rf"\b{left}\b"]
    assert mentions(line, r"round +6/12\b", *numbers)


def test_evaluation_line_has_all_errors(logger, capsys):
    logger(START)
    capsys.readouterr()
    logger(EVAL)
    (line,) = capsys.readouterr().out.splitlines()
    errors = [r"master 0\.46", r"0\.50 0\.56 0\.62", r"ensemble 0\.44"]
    assert mentions(line, r"epoch 0\.50\b", *errors)


@pytest.mark.parametrize(
    ("length", "passes"), [(25, "epoch 0.50 (12.5 passes)"), (1, "epoch 0.50 (0.5 passes)"), ("auto", "epoch 0.50 ")]
)
def test_epoch_is_printed_with_its_passes_over_the_data(length, passes, logger, capsys):
    logger(START | dict(sync_every=length))
    capsys.readouterr()
    logger(round_event(12, 60.0))
    logger(EVAL)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(passes in line for line in lines)
    assert length != "auto" or "pass" not in "".join(lines)  # the number of passes per epoch varies


def rows(out):
    """Return the table of errors: the name of each row, its percentages and the numbers after them."""
    found = re.findall(
        r"^ *(?:.* )?(master|unaveraged|replica \d+|ensemble)((?: +[\d.na]+ %)+)(.*)$", out, re.MULTILINE
    )
    number = r"\d+\.\d+|nan"
    return {name: (re.findall(number, errors), re.findall(number, note)) for name, errors, note in found}


def test_end_prints_a_table_of_errors(logger, capsys):
    logger(START)
    logger(EVAL)
    capsys.readouterr()
    logger(FINISHED)
    out = capsys.readouterr().out
    assert rows(out) == {
        "master": (["0.46"], ["0.0123", "0.43"]),
        "replica 0": (["0.50"], ["0.1235"]),
        "replica 1": (["0.56"], ["0.2500"]),
        "replica 2": (["0.62"], ["0.5000"]),
        "ensemble": (["0.44"], []),
    }
    assert mentions(out, r"\b60\.0 s\b", r"\b1,000 images/s", r"\b2\.50 %", r"\b5\.0 %", str(logger.folder))


def test_end_table_has_both_kinds_of_batch_norm_statistics(logger, capsys):
    logger(START)
    logger(EVAL | RUNNING_STATS)
    capsys.readouterr()
    logger(FINISHED)
    assert {name: errors for name, (errors, _) in rows(capsys.readouterr().out).items()} == {
        "master": ["0.46", "0.57"],
        "replica 0": ["0.50", "0.62"],
        "replica 1": ["0.56", "nan"],
        "replica 2": ["0.62", "10.00"],
        "ensemble": ["0.44", "98.77"],
    }
    logged = json.loads(logger.log.read_text().splitlines()[1])
    assert logged["running_stats_replica_errors"] == [0.625, None, 10.0]


def test_an_unaveraged_master_is_printed_beside_its_average(logger, capsys):
    logger(START)
    capsys.readouterr()
    unaveraged = dict(unaveraged_master_error=0.78, unaveraged_master_loss=0.0234)
    logger(EVAL | RUNNING_STATS | unaveraged | dict(running_stats_unaveraged_master_error=0.89))
    (line,) = capsys.readouterr().out.splitlines()
    assert mentions(line, r"master 0\.46 % .*\b0\.78 %", r"ensemble 0\.44")
    logger(FINISHED)
    table = rows(capsys.readouterr().out)
    assert list(table) == ["master", "unaveraged", "replica 0", "replica 1", "replica 2", "ensemble"]
    assert (table["master"][0], table["unaveraged"][0]) == (["0.46", "0.57"], ["0.78", "0.89"])
    assert table["replica 0"] == (["0.50", "0.62"], ["0.1235"])


def test_end_table_of_12_replicas_is_80_columns_wide(logger, capsys):
    errors, others = [100.0] * 12, {f"running_stats_{name}_error": 100.0 for name in ("master", "ensemble")}
    distances = [1234.5678] * 12
    evaluation = EVAL | others | dict(master_error=100.0, replica_errors=errors, replica_distances=distances)
    for event in (START | dict(num_replicas=12), evaluation | dict(running_stats_replica_errors=errors)):
        logger(event)
    capsys.readouterr()
    logger(FINISHED)
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if str(logger.folder) not in line]
    assert rows(out).keys() == {"master", *(f"replica {number}" for number in range(12)), "ensemble"}
    assert max(map(len, table)) <= 80


def test_end_in_one_process_prints_no_waiting_time(logger, capsys):
    for event in (ONE_PROCESS, EVAL, FINISHED | dict(straggler_seconds=0.0)):
        logger(event)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "synchroniz" in line)
    assert mentions(line, r"\b7\.50 %") and line.count("%") == 1


@pytest.mark.parametrize(
    ("event", "patterns"),
    [
        ({"event": "nonfinite", "round": 7, "replicas": [1]}, ["(?i)warning", r"replica.* 1\b", r"round 7\b"]),
        (
            {"event": "nonfinite", "round": 7, "replicas": [0, 2]},
            ["(?i)warning", r"replica.* 0\b", r"\b2\b", r"round 7\b"],
        ),
        (
            {"event": "checkpoint_failed", "round": 7, "message": "disk full"},
            ["(?i)warning", r"round 7\b", "disk full"],
        ),
        (INTERRUPTED, [r"round 8\b", r"python parle_gpu\.py --resume runs/x$"]),
    ],
)
def test_incidents_are_printed_in_one_line_and_logged(event, patterns, logger, capsys):
    logger(START)
    capsys.readouterr()
    logger(event)
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    assert mentions(line, *patterns) and err == ""
    assert json.loads(logger.log.read_text().splitlines()[-1]) == event


@pytest.mark.parametrize(("on_nan", "restarted"), [("restart", True), ("stop", False)])
def test_restart_of_a_replica_is_printed_only_if_it_happens(on_nan, restarted, logger, capsys):
    logger(START | {"arguments": START["arguments"] | {"on_nan": on_nan}})
    logger({"event": "nonfinite", "round": 7, "replicas": [1]})
    assert ("restarted" in capsys.readouterr().out) == restarted


@pytest.mark.parametrize(
    ("changes", "patterns"),
    [
        ({}, []),
        ({"lr": (0.1, 0.2), "lr_drops": ([2], [])}, [r"\blr\b", r"0\.2", r"0\.1", "lr_drops", r"\[\]", r"\[2\]"]),
    ],
)
def test_resume_prints_where_and_what_has_changed(changes, patterns, logger, capsys):
    logger(START)
    usual = capsys.readouterr().out
    logger(RESUME | dict(changes=changes))
    out, err = capsys.readouterr()
    assert out.startswith(usual) and err == ""
    (line,) = out.removeprefix(usual).splitlines()
    assert mentions(line, r"round 8\b", RESUME["checkpoint"], *patterns)
    assert changes or "lr" not in line
    logger(round_event(8, 60.0))
    assert "round  8/12" in capsys.readouterr().out


@pytest.mark.parametrize(("lines", "more"), [(0, 0), (2, 0), (4, 0), (4, 1000)])
def test_resume_truncates_the_log_at_the_checkpoint(lines, more, tmp_path):
    stopped = RunLogger(tmp_path)
    for event in events()[:4]:
        stopped(event)
    written = stopped.log.read_text().splitlines(keepends=True)
    del stopped
    again = RunLogger(tmp_path, len("".join(written[:lines])) + more)
    assert again.log.read_text().splitlines(keepends=True) == written[:lines]
    again(RESUME)
    assert [json.loads(line)["event"] for line in again.log.read_text().splitlines()[lines:]] == ["resume"]


def test_resume_without_a_log_starts_a_new_one(tmp_path):
    again = RunLogger(tmp_path, 1000)
    again(RESUME)
    assert json.loads(again.log.read_text()) == RESUME


def test_unwritten_log_line_is_reported_and_leaves_whole_lines(logger, capsys):
    logger(START)
    before = logger.log.read_bytes()
    capsys.readouterr()
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, usual[1]))  # a disk with room for ten bytes
    try:
        logger(EVAL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    out, err = capsys.readouterr()
    warning, line = out.splitlines()
    assert mentions(warning, "(?i)warning", re.escape(str(logger.log)), "File too large")
    assert "master 0.46" in line and err == ""
    assert logger.log.read_bytes() == before
    logger(FINISHED)
    assert [json.loads(line) for line in logger.log.read_text().splitlines()] == [START, FINISHED]


def test_new_run_in_a_used_directory_is_refused(logger):
    logger(START)
    before = logger.log.read_bytes()
    with pytest.raises(FileExistsError, match=re.escape(str(logger.log))):
        RunLogger(logger.folder)
    assert logger.log.read_bytes() == before


def test_resume_is_refused_while_the_run_is_alive(tmp_path):
    first = RunLogger(tmp_path)
    first(START)
    before = first.log.read_bytes()
    for log_bytes in (0, len(before)):
        with pytest.raises(FileExistsError, match=re.escape(str(first.log))):
            RunLogger(tmp_path, log_bytes)
        assert first.log.read_bytes() == before
    first(EVAL)
    before = first.log.read_bytes()
    del first
    second = RunLogger(tmp_path, len(before))
    second(RESUME)
    assert second.log.read_bytes().startswith(before)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_file_system_without_locks_is_reported_and_used(tmp_path, number, monkeypatch, capsys):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    first = RunLogger(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert mentions(line, "WARNING", re.escape(str(tmp_path)), os.strerror(number))
    first(START)
    RunLogger(tmp_path, first.log_bytes)(RESUME)
    assert [json.loads(line)["event"] for line in first.log.read_text().splitlines()] == ["start", "resume"]


def closed_pipe():
    reads, writes = os.pipe()
    os.close(reads)
    return os.fdopen(writes, "w")


OUTPUTS = {"full": lambda: open("/dev/full", "w"), "unread pipe": closed_pipe}  # noqa: SIM115


@pytest.mark.parametrize(
    ("output", "terminal"),
    [("full", False), ("full", True), ("unread pipe", False), ("unread pipe", True)],
)
def test_run_continues_when_stdout_is_unusable(output, terminal, logger, monkeypatch):
    if terminal:
        monkeypatch.setenv(supervision.TERMINAL_WIDTH, "100")
    file = OUTPUTS[output]()
    with file:
        monkeypatch.setattr(sys, "stdout", file)
        for event in events():
            logger(event)
        monkeypatch.undo()
    assert [json.loads(line) for line in logger.log.read_text().splitlines()] == events()


def test_existing_directory_without_a_log_is_used(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunLogger(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "log.jsonl"}


def test_directory_that_cannot_be_created_is_an_os_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        RunLogger(tmp_path / "file" / "run")


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)


def test_saved_master_is_a_plain_state_dict_and_replaced(logger, model):
    for _ in range(2):
        logger.save_master(model)
        saved = torch.load(logger.folder / "master.pt", weights_only=True)
        torch.testing.assert_close(saved, dict(model.state_dict()), rtol=0, atol=0)
        assert {path.name for path in logger.folder.iterdir()} == {"log.jsonl", "master.pt"}
        nn.init.ones_(model[0].weight)


def test_master_is_synced_then_renamed(logger, model, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    logger.save_master(model)
    assert calls == ["fsync", "replace"]


def test_saving_the_master_follows_no_link(logger, model, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (logger.folder / "master.tmp").symlink_to(precious)
    logger.save_master(model)
    assert precious.read_text() == "precious"
    assert {path.name for path in logger.folder.iterdir()} == {"log.jsonl", "master.pt"}


def test_failed_save_is_reported_and_keeps_the_old_master(logger, model, monkeypatch, capsys):
    logger.save_master(model)
    before = (logger.folder / "master.pt").read_bytes()

    def save(state, file):
        file.write(before[: len(before) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", save)
    logger.save_master(model)
    assert mentions(capsys.readouterr().out, "(?i)warning", "master.pt", "No space left")
    assert (logger.folder / "master.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value"), [("0.weight", float("nan")), ("0.bias", -float("inf")), ("1.running_var", float("inf"))]
)
def test_nonfinite_master_is_not_saved(logger, model, name, value, capsys):
    logger.save_master(model)
    before = (logger.folder / "master.pt").read_bytes()
    model.state_dict()[name][-1] = value
    capsys.readouterr()
    logger.save_master(model)
    (line,) = capsys.readouterr().out.splitlines()
    assert mentions(line, "(?i)warning", re.escape(f"{logger.folder}/master.pt"))
    assert (logger.folder / "master.pt").read_bytes() == before
    assert {path.name for path in logger.folder.iterdir()} == {"log.jsonl", "master.pt"}


def test_environment_info_has_time_versions_and_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["parle_mpi.py", "-n", "3"])
    found = environment_info()
    assert found.keys() == {
        *("log_version", "time", "command", "python", "torch", "torchvision", "numpy", "machine", "revision")
    }
    assert abs(datetime.strptime(found["time"], "%Y-%m-%dT%H:%M:%S%z") - datetime.now(UTC)) < timedelta(minutes=1)
    assert found["command"] == ["parle_mpi.py", "-n", "3"]
    assert (found["python"], found["torch"]) == (platform.python_version(), torch.__version__)
    assert platform.machine() in found["machine"]
    assert json.loads(json.dumps(found)) == found


@pytest.fixture
def git(tmp_path):
    """A function that runs git in a new repository, which contains the program, and returns what it prints."""

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", tmp_path / "clone", *who, *arguments]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()

    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    (tmp_path / "clone" / "parle").mkdir(parents=True)
    for name in ("README.md", "main.py", "parle/logger.py"):
        (tmp_path / "clone" / name).write_text("before")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    return git


@pytest.mark.parametrize(
    ("changed", "expected"),
    [(None, "{commit}"), ("README.md", "{commit}"), ("main.py", "{commit}-dirty")],
)
def test_revision_is_the_commit_and_whether_code_differs(changed, expected, git, tmp_path, monkeypatch):
    if changed:
        (tmp_path / "clone" / changed).write_text("after")
    monkeypatch.setattr("parle.logger.__file__", str(tmp_path / "clone" / "parle" / "logger.py"))
    assert revision() == expected.format(commit=git("rev-parse", "HEAD"))


def test_revision_is_found_in_a_directory_of_any_name(git, tmp_path, monkeypatch):
    commit, renamed = git("rev-parse", "HEAD"), tmp_path / os.fsdecode(b"clone\xff")
    git("config", "core.quotePath", "false")
    (tmp_path / "clone").rename(renamed)
    monkeypatch.setattr("parle.logger.__file__", str(renamed / "parle" / "logger.py"))
    assert revision() == commit
    monkeypatch.setattr("parle.logger.__file__", str(renamed / "parle" / "untracked.py"))
    assert revision() is None


def test_revision_is_of_the_repository_with_the_program(git, tmp_path, monkeypatch):
    monkeypatch.setattr("parle.logger.__file__", str(tmp_path / "clone" / "parle" / "logger.py"))
    git("init", "-q", str(tmp_path / "other"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))  # as in a git hook
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "other" / "index"))
    assert revision() == git("rev-parse", "HEAD")


@pytest.mark.parametrize(("is_installed", "expected"), [(True, "1.2.3"), (False, None)])
def test_revision_in_another_repository_is_the_installed_version(is_installed, expected, git, tmp_path, monkeypatch):
    site = tmp_path / "clone" / "env"
    (site / "parle").mkdir(parents=True)
    for folder in (site, tmp_path) if is_installed else (tmp_path,):
        (folder / "parle-1.2.3.dist-info").mkdir(parents=True)
        (folder / "parle-1.2.3.dist-info" / "METADATA").write_text("Name: parle\nVersion: 1.2.3\n")
    monkeypatch.syspath_prepend(str(site if is_installed else tmp_path))
    monkeypatch.setattr("parle.logger.__file__", str(site / "parle" / "logger.py"))
    assert revision() == expected


@pytest.mark.parametrize(
    "git",
    [
        lambda command: subprocess.CompletedProcess(command, 128, "", "fatal: not a git repository"),
        FileNotFoundError(2, "No such file or directory", "git"),
        subprocess.TimeoutExpired("git", 10),
    ],
    ids=["no repository", "no git", "hangs"],
)
def test_revision_is_none_without_git_and_installation(git, tmp_path, monkeypatch):
    def run(command, **options):
        assert command[0] == "git"
        assert options["timeout"] <= 10
        if isinstance(git, Exception):
            raise git
        return git(command)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("parle.logger.__file__", str(tmp_path / "parle" / "logger.py"))
    assert revision() is None


@pytest.mark.parametrize("columns", ["100", None])
def test_terminal_shows_a_bar_instead_of_round_lines(columns, logger, monkeypatch, capsys):
    if columns:
        monkeypatch.setenv(supervision.TERMINAL_WIDTH, columns)
    else:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for event in events():
        logger(event)
    out, err = capsys.readouterr()
    assert not err and not re.search(r"round +\d+/\d+", out)
    assert "master 0.46" in out
    lines = [line for line in re.split(r"[\r\n]", out) if line.strip()]
    bars = [line for line in lines if "|" in line]
    table = next(line for line in lines if re.search(r"master +0\.46 %.*0\.0123", line))
    assert "12/12" in bars[-1] and lines.index(bars[-1]) < lines.index(table)
    if columns:
        assert max(map(len, bars)) <= 100


def test_bar_of_a_resumed_run_starts_where_it_stopped(logger, monkeypatch, capsys):
    monkeypatch.setenv(supervision.TERMINAL_WIDTH, "100")
    for event in (RESUME, INTERRUPTED):
        logger(event)
    out = capsys.readouterr().out
    bars = [line for line in re.split(r"[\r\n]", out) if "|" in line]
    assert "7/12" in bars[0] and "7/12" in bars[-1]
    assert "round 8" in out.splitlines()[-1]


@pytest.mark.parametrize("begin", [START, RESUME])
def test_bar_estimates_time_left_from_this_process(begin, logger, monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setenv(supervision.TERMINAL_WIDTH, "150")
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    logger(begin)
    first = begin.get("round", 0) + 1
    for number in range(first, first + 3):
        now[0] += 70.0
        logger(round_event(number, 1.0))
    logger(INTERRUPTED)
    *_, bar = (line for line in re.split(r"[\r\n]+", capsys.readouterr().out) if "|" in line)
    minutes, seconds = divmod(70 * (12 - first - 2), 60)
    assert mentions(bar, f"{first + 2}/12", f"{minutes:02}:{seconds:02}", r"0\.2500", r"7\.12 %")


@pytest.mark.parametrize("last", ["interrupted", "finished"])
def test_finished_run_can_be_resumed_in_the_same_process(tmp_path, last):
    first = RunLogger(tmp_path)
    for event in events() if last == "finished" else [START, INTERRUPTED]:
        first(event)
    RunLogger(tmp_path, 0)
    assert first.log.exists()
