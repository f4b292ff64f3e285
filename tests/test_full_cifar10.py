import pytest

from benchmarks import full_cifar10, results
from benchmarks.reproduce_paper import parse
from parle.training import Schedule
from tests.test_compare_methods import cells

PASS = 391  # steps


@pytest.mark.parametrize(
    ("method", "factor"), [("Parle", 1), ("Parle, ρ = 0.1", 1), ("SGD", 1), ("SGD, 3 × the steps", 3)]
)
def test_runs_match_in_steps_and_schedule(method, factor):
    args = parse(full_cifar10.flags_of(method, 43))
    schedule = Schedule(args.epochs, args.lr_drops)
    rounds = schedule.num_rounds(PASS)
    assert rounds * args.sync_every == factor * 25 * PASS and args.seed == 43
    drops = [milestone / rounds for milestone in schedule.lr_milestones(PASS)]
    assert drops == pytest.approx([0.4, 0.7, 0.9], abs=2e-3)
    assert args.master_average ** (25 / args.sync_every) == pytest.approx(0.9, abs=1e-3)
    same = ("model", "dataset", "amp", "lr", "lr_decay", "momentum", "weight_decay", "dropout", "augment")
    ours = parse(full_cifar10.flags_of("Parle", 42))
    assert all(getattr(args, name) == getattr(ours, name) for name in same)
    assert (args.replicas, args.rho) == ((3, 0.1 if "0.1" in method else 0.01) if "Parle" in method else (1, 0))
    assert full_cifar10.CHECKPOINT_EVERY % args.sync_every == 0


def test_table_shows_both_errors_of_finished_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for seed, error in ((43, 8.5), (42, 8.1)):
        command = " ".join(["python", "parle_mpi.py", *full_cifar10.flags_of("SGD", seed)])
        row = dict(method="SGD", seed=seed, command=command, steps_per_replica=9775, num_replicas=1)
        results.append_row(full_cifar10.NAME, row | dict(master_error=error - 0.5, unaveraged_master_error=error))
    results.append_row(
        full_cifar10.NAME, dict(method="SGD", seed=44, command="python parle_mpi.py -B 1")
    )  # once, otherwise
    ((method, steps, total, error, averaged, seeds, _),) = cells(full_cifar10.table())
    assert (method, steps, total, seeds) == ("SGD", "9,775", "9,775", "42, 43")
    assert (error, averaged) == ("8.30 ± 0.28", "7.80 ± 0.28")
