import os

import pytest

from benchmarks import fault_tolerance, results


def test_table_summarizes_the_trials_of_each_fault(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for seed, saved, seconds, identical in ((1, 5, 1.0, True), (2, 4, 3.0, False)):
        row = dict(
            test="own ranks", fault="a rank raises", seed=seed, fault_after_round=5, saved_round=saved, exit_status=1
        )
        results.append_row("fault_tolerance", row | dict(seconds=seconds, bitwise_identical=identical))
    row = dict(
        test="own ranks", fault="SIGUSR1", seed=1, fault_after_round=3, saved_round=15, exit_status=0, seconds=3.0
    )
    results.append_row("fault_tolerance", row | dict(bitwise_identical=True))
    raises, continues = (line.strip("| ").split(" | ") for line in fault_tolerance.table().splitlines()[2:])
    assert raises == ["a rank raises", "2", "1", "1.0 to 3.0", "1", "1 of 2"]
    assert continues[:3] == ["SIGUSR1", "1", "0"] and continues[-1] == "1 of 1"


def test_launcher_table_has_a_row_per_library_and_launcher(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    common = dict(test="launchers", mpi="MPICH 5", seconds=1.0, bitwise_identical=True)
    for fault, status, printed in (("no fault", 0, False), ("SIGTERM", 75, True), ("a rank raises", 1, False)):
        row = common | dict(fault=fault, exit_status=status, resume_command_printed=printed)
        results.append_row("fault_tolerance", row | dict(launcher="mpiexec -n 3"))
    results.append_row("fault_tolerance", row | dict(launcher="", bitwise_identical=False))
    header, _, launched, own = (line.strip("| ").split(" | ") for line in fault_tolerance.launcher_table().splitlines())
    cells = dict(zip(header, launched, strict=False))
    assert launched[:2] == ["MPICH 5", "`mpiexec -n 3`"]
    assert (cells["no fault"], cells["SIGTERM"], cells["a rank raises"]) == ("0", "75, 1.0 s", "(1, 1.0 s)")
    assert "another master" in dict(zip(header, own, strict=False))["a rank raises"]
    assert fault_tolerance.table().count("\n") == 1  # no row


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("fault", ["a rank raises", "SIGTERM, `parle_gpu.py`"])
def test_a_trial_injects_a_fault_and_resumes(fault, monkeypatch, tmp_path, proc):
    for name in [name for name in os.environ if name.startswith("PMI")]:
        monkeypatch.delenv(name)
    row = fault_tolerance.run_trial(fault_tolerance.FAULTS[fault], 2, proc, tmp_path / "run")
    assert row["exit_status"] == (75 if "SIGTERM" in fault else 1) and row["resumed_exit_status"] == 0
    assert 3 == row["fault_after_round"] <= row["saved_round"] < fault_tolerance.ROUNDS
    assert row["resume_command_printed"]
    assert all(tensor.isfinite().all() for tensor in fault_tolerance.load_master(tmp_path / "run"))
