"""plot.py: what it reads of a log, what it draws of that, and the files it writes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import options
import parle_gpu
import plot
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("no_launcher")

ARGUMENTS = dict(model="lenet", dataset="mnist", seed=42, replicas=2, method="parle", sync_every=25, gamma=0.01)
NAN = float("nan")


def start(**changed):
    return {"event": "start", "arguments": ARGUMENTS | changed}


def round_event(number, **changed):
    event = dict(event="round", round=number, epoch=number / 10, seconds=2.0 * number, loss=1 / number)
    return event | dict(gamma=0.01 * number, rho=0.5 * number, spread=0.1 * (number - 1)) | changed


def eval_event(number, replicas=2, **changed):
    event = dict(event="eval", round=number, epoch=number / 10, seconds=2.0 * number, master_error=5 / number)
    errors = [6.0 / number + replica for replica in range(replicas)]
    return event | dict(replica_errors=errors, ensemble_error=4 / number, distances=[0.5] * replicas) | changed


def events(rounds=4, **changed):
    body = [event for k in range(1, rounds + 1) for event in (round_event(k), eval_event(k))]
    return [start(**changed), *body, {"event": "end", "seconds": 8.0}]


@pytest.fixture
def write(tmp_path):
    """A run's folder with this log in it."""

    def write(events, name="run", end="\n"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, events)) + end)
        return tmp_path / name

    return write


@pytest.fixture
def main(monkeypatch, tmp_path, capsys):
    """main() with these arguments, in an empty folder; gives its exit status and what it said."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
        try:
            plot.main()
            status = 0
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return main


# Reading


def test_a_log_is_read_by_columns(write):
    folder = write([*events(), {"event": "lost", "round": 3, "replicas": [1]}])
    run = plot.read(folder)
    assert (run.folder, run.arguments) == (folder, ARGUMENTS)
    assert run.rounds["loss"] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert run.rounds["seconds"].tolist() == [2, 4, 6, 8]
    assert run.evals["replica_errors"].tolist() == [[6, 7], [3, 4], [2, 3], [1.5, 2.5]]
    assert run.lost.tolist() == [3]


@pytest.mark.parametrize("rest", ['{"event": "round", "rou', "{", '{"event": "end"}'])
def test_the_line_that_a_run_is_writing_is_left_out(rest, write):
    run = plot.read(write(events()[:4], end="\n" + rest))
    assert run.rounds["round"].tolist() == [1, 2]


def test_what_has_diverged_is_a_gap(write):
    log = [start(), round_event(1), round_event(2, loss=None, spread=None), eval_event(2, master_error=None)]
    log[-1]["replica_errors"][1] = None
    run = plot.read(write(log))
    np.testing.assert_equal(run.rounds["loss"], [1, NAN])
    np.testing.assert_equal(run.evals["master_error"], [NAN])
    np.testing.assert_equal(run.evals["replica_errors"], [[3, NAN]])


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2)])
def test_a_run_may_have_been_resumed_with_other_replicas(before, after, write):
    resume = {"event": "resume", "arguments": ARGUMENTS | dict(replicas=after), "round": 1}
    first, second = [round_event(1), eval_event(1, before)], [round_event(2), eval_event(2, after)]
    run = plot.read(write([start(replicas=before), *first, {"event": "stop"}, resume, *second]))
    assert run.arguments["replicas"] == after
    expected = [[6, 7, 8][:before] + [NAN] * (3 - before), [3, 4, 5][:after] + [NAN] * (3 - after)]
    np.testing.assert_equal(run.evals["replica_errors"], expected)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no round yet"),
        (json.dumps(start()) + "\n", "has no round yet"),
        ("no json\n", "is not the log of a run"),
        ("[1]\n", "is not the log of a run"),
        ('{"loss": 1}\n', "is not the log of a run"),
        ("[" * 100_000 + "\n", "is not the log of a run"),
        (json.dumps(round_event(1)) + "\n", "is not the log of a run"),
        ("\n".join(map(json.dumps, [start(), round_event(1, loss="high")])) + "\n", "is not the log of a run"),
        ("\n".join(map(json.dumps, [start(), round_event(1, seconds=10**400)])) + "\n", "is not the log of a run"),
        ("\n".join(map(json.dumps, [start(), {"event": "round", "round": 1}])) + "\n", "is not the log of a run"),
        (b"\xff\xfe\n", "is not the log of a run"),
        (None, "name the folder of a run"),
    ],
)
def test_what_is_no_log_is_a_mistake_that_names_it(text, told, tmp_path):
    if text is not None:
        (tmp_path / "log.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(options.Mistake, match=f"(?s)log.jsonl.*{told}"):
        plot.read(tmp_path)


# Labels


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([{}, dict(seed=43)], ["seed=42", "seed=43"]),
        ([{}, dict(method="sgd", replicas=1, sync_every=1, gamma=0.0)], ["parle", "sgd"]),
        ([dict(gamma=0.1 + 0.2), dict(gamma=0.0), dict(gamma=1e-05)], ["γ=0.3", "γ=0", "γ=1e-05"]),
        (
            [{}, dict(seed=43), dict(method="sgd"), dict(method="sgd", seed=43)],
            ["parle, seed=42", "parle, seed=43", "sgd, seed=42", "sgd, seed=43"],
        ),
        ([dict(replicas=6), dict(sync_every="auto")], ["n=6", "n=2"]),
        ([dict(lr_drops=[1.0, 2.5]), dict(lr_drops=[])], ["lr-drops=1 2.5", "lr-drops=none"]),
        ([dict(augment=True), {}], ["augment=True", "augment=None"]),
        ([{}, {}], ["run0", "run1"]),
        ([{}, {}, dict(seed=1)], ["seed=42, run0", "seed=42, run1", "seed=1, run2"]),
        ([dict(out="a", device="cpu"), dict(out="b", device="cuda")], ["run0", "run1"]),
    ],
)
def test_a_label_tells_no_more_than_what_tells_runs_apart(changes, expected):
    runs = [plot.Run(Path(f"run{i}"), ARGUMENTS | changed, {}, {}, np.zeros(0)) for i, changed in enumerate(changes)]
    assert plot.labels(runs) == expected


# Drawing


def drawn(*folders):
    """The panels by what they show: test error, loss, error and loss by the clock, distance, coefficient."""
    figure = plot.draw([plot.read(folder) for folder in folders])
    error, error_time, loss, loss_time, distance, coefficient = figure.axes
    assert (error.get_ylabel(), loss.get_ylabel()) == ("test error (%)", "training loss")
    return figure, dict(
        error=error, error_time=error_time, loss=loss, loss_time=loss_time, distance=distance, coefficient=coefficient
    )


def curves(axes):
    return [np.array(line.get_xydata()).T.tolist() for line in axes.lines]


def test_every_curve_is_where_the_log_has_it(write):
    _, panels = drawn(write(events()))
    epochs, seconds = [0.1, 0.2, 0.3, 0.4], [2.0, 4.0, 6.0, 8.0]
    errors = [[6, 3, 2, 1.5], [7, 4, 3, 2.5], [4, 2, 4 / 3, 1], [5, 2.5, 5 / 3, 1.25]]
    for name, when in (("error", epochs), ("error_time", seconds)):
        np.testing.assert_allclose(curves(panels[name]), [[when, values] for values in errors])
        widths = [line.get_linewidth() for line in panels[name].lines]
        assert widths[0] == widths[1] < widths[2] < widths[3]
    for name, when in (("loss", epochs), ("loss_time", seconds)):
        np.testing.assert_allclose(curves(panels[name]), [[when, [1, 1 / 2, 1 / 3, 1 / 4]]])
    gamma, rho = curves(panels["coefficient"])
    np.testing.assert_allclose([gamma, rho], [[epochs, [0.01, 0.02, 0.03, 0.04]], [epochs, [0.5, 1, 1.5, 2]]])
    assert {axes.get_yscale() for axes in panels.values()} == {"log"}


def test_a_spread_is_drawn_at_the_line_where_it_was_measured(write):
    _, panels = drawn(write(events()))
    *replicas, spread = curves(panels["distance"])
    np.testing.assert_allclose(spread, [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
    np.testing.assert_allclose(replicas, [[[0.1, 0.2, 0.3, 0.4], [0.5] * 4]] * 2)


@pytest.mark.parametrize("replicas", [1, 3])
def test_of_many_points_a_curve_has_the_means_of_neighbours(replicas, write):
    count = 10 * plot.MOST
    log = [start(), *(round_event(k) for k in range(1, count + 1))]
    log += [eval_event(k, replicas, replica_errors=[float(k)] * replicas) for k in range(1, count + 1)]
    _, panels = drawn(write(log))
    assert len(panels["error"].lines) == replicas + 2
    means = [10 * i + 5.5 for i in range(plot.MOST)]
    np.testing.assert_allclose(curves(panels["error_time"])[0], [[2 * mean for mean in means], means])
    assert {len(line.get_xdata()) for axes in panels.values() for line in axes.lines} == {plot.MOST}


@pytest.mark.parametrize(("lowest", "scale"), [(0.5, "log"), (0.0, "linear"), (None, "log")])
def test_an_error_of_nothing_is_seen_and_one_that_diverged_is_not(lowest, scale, write):
    log = events()
    log[-2]["master_error"] = lowest
    _, panels = drawn(write(log))
    assert panels["error"].get_yscale() == panels["error_time"].get_yscale() == scale
    assert panels["loss"].get_yscale() == "log"


def test_where_nothing_is_coupled_and_nothing_evaluated_panels_are_empty(write):
    figure, panels = drawn(write([start(), *(round_event(k, gamma=0.0, rho=0.0, spread=0.0) for k in (1, 2))]))
    told = {name for name, axes in panels.items() if "none" in [text.get_text() for text in axes.texts]}
    assert told == {"error", "error_time", "distance", "coefficient"}
    assert np.isfinite(panels["loss"].lines[0].get_ydata()).all()
    figure.draw_without_rendering()


def test_a_run_that_has_diverged_altogether_is_drawn(write):
    figure, _ = drawn(write([start(), round_event(1, loss=None, spread=None), eval_event(1, master_error=None)]))
    figure.draw_without_rendering()


def test_a_lost_replica_is_marked_where_it_was(write):
    log = [start(), round_event(2), {"event": "lost", "round": 3, "replicas": [0]}, round_event(4)]
    _, panels = drawn(write(log))
    marks = {
        name: float(line.get_xdata()[0])
        for name, axes in panels.items()
        for line in axes.lines
        if line.get_marker() == "x"
    }
    assert marks == pytest.approx(dict(error=0.3, error_time=6.0, loss=0.3, loss_time=6.0, distance=0.3))
    assert [text.get_text() for text in panels["loss"].get_legend().get_texts()] == ["a replica was lost"]


@pytest.mark.parametrize("count", [2, 10, 11, 30])
def test_runs_overlaid_have_a_colour_and_a_label_each(count, write):
    folders = [write(events(seed=seed), f"run{seed}") for seed in range(count)]
    figure, panels = drawn(*folders)
    colors = [tuple(np.atleast_1d(line.get_color())) for line in panels["loss"].lines]
    assert len(set(colors)) == len(colors) == count
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"seed={seed}" for seed in range(count)]
    assert figure.get_suptitle() == "lenet, mnist, parle"
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    assert min(axes.get_window_extent().height for axes in panels.values()) > 100


def test_one_run_is_named_by_its_title(write):
    figure, _ = drawn(write(events()))
    assert figure.get_suptitle() == "lenet, mnist, parle, n=2, L=25, seed=42"
    assert not figure.legends


# The program


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_file_is_what_its_name_says_and_small(suffix, begins, write, main, tmp_path):
    out = tmp_path / f"figure{suffix}"
    folders = [write(events(300, seed=seed), f"run{seed}") for seed in range(2)]
    assert main(*folders, "-o", out) == (0, f"{out}\n", "")
    content = out.read_bytes()
    assert content.startswith(begins)
    assert len(content) < 100_000


def test_by_default_the_figure_is_beside_the_first_log(write, main):
    first, second = write(events()), write(events(seed=1), "other")
    assert main(first, second) == (0, f"{first / 'plot.png'}\n", "")
    assert {path.name for path in first.iterdir()} == {"log.jsonl", "plot.png"}
    assert {path.name for path in second.iterdir()} == {"log.jsonl"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "the following arguments are required: RUN"),
        (("nowhere",), "nowhere/log.jsonl': name the folder of a run"),
        (("RUN", "nowhere"), "nowhere/log.jsonl': name the folder of a run"),
        (("RUN", "-o", "figure.gif"), "-o figure.gif: use a name that ends in .png, .svg, .pdf"),
        (("RUN", "-o", "figure"), "-o figure: use a name that ends in .png, .svg, .pdf"),
        (("RUN", "-o", "nowhere/figure.png"), "'nowhere/figure.png'; name another file"),
        (("RUN", "-o", "nowhere/figure.svg"), "'nowhere/figure.svg'; name another file"),
        (("RUN", "--ouput", "figure.png"), "unknown argument --ouput; did you mean --out?"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, told, write, main, tmp_path):
    folder = write(events())
    status, out, err = main(*(folder if argument == "RUN" else argument for argument in arguments))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("plot.py: error: ") and err.endswith(f"{told}\n")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"log.jsonl"}


@pytest.mark.slow
def test_the_log_of_a_real_run_is_drawn(main, proc, monkeypatch, python):
    settings = ("-d", "digits", "-n", 2, "-L", 2, "-B", 0.5, "-b", 64, "--proc", proc, "--out", "run")
    monkeypatch.setattr(sys, "argv", ["parle_gpu.py", *map(str, settings)])
    parle_gpu.main()
    done = python(ROOT / "plot.py", "run", cwd=Path.cwd())
    assert (done.returncode, done.stdout, done.stderr) == (0, "run/plot.png\n", "")
    _, panels = drawn(Path("run"))
    assert all(len(axes.lines) > 0 for axes in panels.values())
