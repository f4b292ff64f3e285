import torch

from benchmarks import message_precision
from parle.distributed import MPIGroup


def test_training_is_reproducible_and_learns(comm, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # for proc/
    monkeypatch.setattr(message_precision, "ROUNDS", 8)
    first, second, other = (
        message_precision.train("logistic regression", 0.1, dtype, seed, MPIGroup(comm))
        for dtype, seed in ((None, 42), (torch.float16, 42), (None, 43))
    )
    assert torch.equal(first["master"], second["master"])  # one replica sends no message
    assert not torch.equal(first["master"], other["master"])
    assert first["test_error"] < 40


def test_table_has_the_largest_difference_and_the_mean_error(monkeypatch):
    rows = [
        dict(
            network="logistic regression",
            lr=0.1,
            message_dtype=dtype,
            seed=seed,
            difference=difference,
            test_error=error,
        )
        for dtype, seed, difference, error in (
            ("float32", 42, 0.0, 3.0),
            ("float32", 43, 0.0, 4.0),
            ("float16", 42, 2e-5, 3.5),
            ("float16", 43, 4e-5, 3.5),
        )
    ]
    monkeypatch.setattr(message_precision.results, "read_rows", lambda name: rows)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in message_precision.table().splitlines()[2:]]
    assert lines == [
        ["logistic regression", "0.1", "float32", "0", "3.50 ± 0.71", "2"],
        ["logistic regression", "0.1", "float16", "4e-05", "3.50 ± 0.00", "2"],
    ]
