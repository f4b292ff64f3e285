import pytest

from benchmarks import results
from benchmarks import time_to_error as tte


@pytest.fixture
def add_row(monkeypatch, tmp_path):
    """Append a row to an empty directory of results. A point of a curve is [steps, seconds, error, averaged error]."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)

    def add_row(method, *curve, link=100, seed=42, workload="lenet"):
        row = dict(workload=workload, mbits=link, method=method, seed=seed, curve=curve, bytes_sent=2_000_000)
        results.append_row(tte.NAME, row)

    return add_row


def test_seconds_are_those_of_the_first_point_that_reaches_the_target():
    row = dict(curve=[[50, 1.0, 3.0, 4.0], [100, 2.0, 1.0, 0.9], [150, 3.0, 1.1, 0.7]])
    assert tte.seconds_to(1.0, row, tte.UNAVERAGED) == 2.0
    assert tte.seconds_to(0.7, row, tte.AVERAGED) == 3.0
    assert tte.seconds_to(0.7, row, tte.UNAVERAGED) is None


def test_ratio_pairs_the_seeds_and_needs_all_of_them(add_row):
    for seed, ours, theirs in ((42, 1.0, 3.0), (43, 2.0, 10.0)):
        add_row("ddp", [50, theirs, 0.9, 0.9], seed=seed)
        add_row("parle", [50, ours, 0.9, 0.9], seed=seed)
    assert tte.ratio_to_parle("lenet", 100, "ddp", 1.0, tte.AVERAGED) == "4.0 ± 1.4"
    assert tte.ratio_to_parle("lenet", 100, "ddp", 0.7, tte.AVERAGED) == "—"
    assert tte.ratio_to_parle("lenet", 1000, "ddp", 1.0, tte.AVERAGED) == "—"


def test_table_and_figure_show_seconds_and_bytes(add_row):
    add_row("parle", [50, 1.0, 3.0, 0.9], [1000, 2.0, 1.0, 0.7])
    add_row("ddp", [50, 4.0, 0.9, 0.9], [100, 8.0, 0.8, 0.7], link=None)
    first, second = tte.table().splitlines()[2:]
    parle = [cell.strip() for cell in first.split("|")[1:-1]]
    assert parle[:3] == ["lenet", "100 Mb/s", "Parle"]
    assert parle[4:] == ["2.0", "1.0", "1.0", "—", "2.0", "1.0", "2"]
    assert "not limited" in second and second.split("|")[-2].strip() == "20"
    assert [len(axis.lines) for axis in tte.draw_errors().axes] == [4, 2, 4]


def test_headline_gives_the_ratio_of_the_weights_themselves(add_row):
    for seed in tte.SEEDS:
        add_row("parle", [50, 1.0, 3.0, 0.9], [1000, 2.0, 1.0, 0.7], seed=seed)
        add_row("ddp", [50, 4.0, 1.1, 0.9], [100, 8.0, 0.8, 0.7], seed=seed)
    limited, *_ = (line.strip("| ").split(" | ") for line in tte.headline().splitlines()[2:])
    assert limited == ["100 Mb/s", "2.0 ± 0.0", "—", "—", "8.0 ± 0.0", "4.0 ± 0.0"]


def test_only_methods_without_a_row_are_run(add_row):
    assert tte.missing(100, "lenet", 43) == list(tte.COMPARED)
    add_row("ddp", [50, 1.0, 1.0, 1.0], seed=43)
    assert set(tte.COMPARED) - set(tte.missing(100, "lenet", 43)) == {"ddp"}
    assert tte.missing(100, "lenet", 42) == tte.missing(None, "lenet", 43) == list(tte.COMPARED)


def test_lr_is_constant():
    for workload in tte.WORKLOADS:
        assert all(tte.settings(workload, method)["lr_drops"] == [] for method in tte.COMPARED)
    assert tte.settings("lenet", "ddp")["lr"] == 0.05 and tte.settings("allcnn-32", "ddp")["lr"] == 0.1
