"""Plots of runs: reading logs, drawing curves and writing files."""

import json
import os
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import parle_gpu
from parle import cli, plot
from parle.logger import LOG_VERSION
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("no_launcher")

ARGUMENTS = dict(model="lenet", dataset="mnist", seed=42, replicas=2, method="parle", sync_every=25, gamma=0.01)
NAN = float("nan")


def start(**changed):
    return {"event": "start", "log_version": LOG_VERSION, "arguments": ARGUMENTS | changed}


def round_event(number, **changed):
    event = dict(event="round", round=number, epoch=number / 10, train_seconds=2.0 * number, train_loss=1 / number)
    event |= dict(gamma_k=0.01 * number, coupling_k=0.5 * number, replica_distance_rms=0.1 * (number - 1))
    return event | changed


def eval_event(number, replicas=2, **changed):
    event = dict(event="eval", round=number, epoch=number / 10, train_seconds=2.0 * number, master_error=5 / number)
    errors = [6.0 / number + replica for replica in range(replicas)]
    return event | dict(replica_errors=errors, ensemble_error=4 / number, replica_distances=[0.5] * replicas) | changed


def events(rounds=4, **changed):
    body = [event for k in range(1, rounds + 1) for event in (round_event(k), eval_event(k))]
    return [start(**changed), *body, {"event": "finished", "train_seconds": 8.0}]


@pytest.fixture
def write(tmp_path):
    """A function that writes events to the log of a new run and returns its directory."""

    def write(events, name="run", end="\n"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, events)) + end)
        return tmp_path / name

    return write


@pytest.fixture
def main(monkeypatch, tmp_path, capsys):
    """main() with arguments, in an empty directory; returns its exit status, stdout and stderr."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["parle.plot", *map(str, arguments)])
        try:
            plot.main()
            status = 0
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return main


# Reading


def test_log_is_read_into_columns(write):
    folder = write([*events(), {"event": "nonfinite", "round": 3, "replicas": [1]}])
    run = plot.read(folder)
    assert (run.folder, run.arguments) == (folder, ARGUMENTS)
    assert run.rounds["train_loss"] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert run.rounds["train_seconds"].tolist() == [2, 4, 6, 8]
    assert run.evals["replica_errors"].tolist() == [[6, 7], [3, 4], [2, 3], [1.5, 2.5]]
    assert run.nonfinite.tolist() == [3]


def test_log_of_version_1_is_plotted_like_version_2(write):
    old_names = {
        **dict(train_seconds="seconds", train_loss="loss", gamma_k="gamma", coupling_k="rho"),
        **dict(replica_distance_rms="spread", replica_distances="distances"),
        **dict(nonfinite="lost", finished="end"),  # events
    }
    new = [*events(), {"event": "nonfinite", "round": 3, "replicas": [1]}]
    old = [{old_names.get(key, key): value for key, value in event.items()} for event in new]
    old = [event | {"event": old_names.get(event["event"], event["event"])} for event in old]
    del old[0]["log_version"]
    old[0]["arguments"] = old[0]["arguments"] | dict(outer_step=2.0, whiten=True)
    new[0]["arguments"] = new[0]["arguments"] | dict(outer_lr_scale=2.0, zca=True)
    assert "log_version" not in json.dumps(old) and "train_" not in json.dumps(old)
    upgraded, expected = plot.read(write(old, "old")), plot.read(write(new, "new"))
    np.testing.assert_equal(upgraded._replace(folder=expected.folder)._asdict(), expected._asdict())
    assert len(expected.nonfinite) == 1 and len(drawn(upgraded.folder)[1]["distance"].lines) == 4


@pytest.mark.parametrize("rest", ['{"event": "round", "rou', "{", '{"event": "finished"}'])
def test_unfinished_last_line_is_ignored(rest, write):
    run = plot.read(write(events()[:4], end="\n" + rest))
    assert run.rounds["round"].tolist() == [1, 2]


def test_null_becomes_nan(write):
    log = [
        start(),
        round_event(1),
        round_event(2, train_loss=None, replica_distance_rms=None),
        eval_event(2, master_error=None),
    ]
    log[-1]["replica_errors"][1] = None
    run = plot.read(write(log))
    np.testing.assert_equal(run.rounds["train_loss"], [1, NAN])
    np.testing.assert_equal(run.evals["master_error"], [NAN])
    np.testing.assert_equal(run.evals["replica_errors"], [[3, NAN]])


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2)])
def test_number_of_replicas_may_change_in_a_log(before, after, write):
    resume = {"event": "resume", "arguments": ARGUMENTS | dict(replicas=after), "round": 1}
    first, second = [round_event(1), eval_event(1, before)], [round_event(2), eval_event(2, after)]
    run = plot.read(write([start(replicas=before), *first, {"event": "interrupted"}, resume, *second]))
    assert run.arguments["replicas"] == after
    expected = [[6, 7, 8][:before] + [NAN] * (3 - before), [3, 4, 5][:after] + [NAN] * (3 - after)]
    np.testing.assert_equal(run.evals["replica_errors"], expected)


@pytest.mark.parametrize(
    "text",
    [
        "",
        json.dumps(start()) + "\n",
        "no json\n",
        "[1]\n",
        '{"train_loss": 1}\n',
        "[" * 100_000 + "\n",
        json.dumps(round_event(1)) + "\n",
        "\n".join(map(json.dumps, [start(), round_event(1, train_loss="high")])) + "\n",
        "\n".join(map(json.dumps, [start(), round_event(1, train_seconds=10**400)])) + "\n",
        "\n".join(map(json.dumps, [start(), {"event": "round", "round": 1}])) + "\n",
        b"\xff\xfe\n",
        None,
    ],
)
def test_invalid_log_is_a_usage_error_that_names_the_file(text, tmp_path):
    if text is not None:
        (tmp_path / "log.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(cli.UsageError, match=r"log\.jsonl"):
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
def test_labels_contain_only_what_differs(changes, expected):
    runs = [plot.Run(Path(f"run{i}"), ARGUMENTS | changed, {}, {}, np.zeros(0)) for i, changed in enumerate(changes)]
    assert plot.labels(runs) == expected


# Drawing


def drawn(*folders):
    """Return the figure and its panels by name: errors and losses over epochs and time, distance, coefficient."""
    figure = plot.plot_runs([plot.read(folder) for folder in folders])
    error, error_time, loss, loss_time, distance, coefficient = figure.axes
    assert "error" in error.get_ylabel() and "loss" in loss.get_ylabel()
    return figure, dict(
        error=error, error_time=error_time, loss=loss, loss_time=loss_time, distance=distance, coefficient=coefficient
    )


def curves(axes):
    return [np.array(line.get_xydata()).T.tolist() for line in axes.lines]


def test_curves_have_the_values_of_the_log(write):
    _, panels = drawn(write(events()))
    epochs, seconds = [0.1, 0.2, 0.3, 0.4], [2.0, 4.0, 6.0, 8.0]
    errors = [[6, 3, 2, 1.5], [7, 4, 3, 2.5], [4, 2, 4 / 3, 1], [5, 2.5, 5 / 3, 1.25]]
    for name, xs in (("error", epochs), ("error_time", seconds)):
        np.testing.assert_allclose(curves(panels[name]), [[xs, values] for values in errors])
        widths = [line.get_linewidth() for line in panels[name].lines]
        assert widths[0] == widths[1] < widths[2] < widths[3]
    for name, xs in (("loss", epochs), ("loss_time", seconds)):
        np.testing.assert_allclose(curves(panels[name]), [[xs, [1, 1 / 2, 1 / 3, 1 / 4]]])
    gamma_k, coupling_k = curves(panels["coefficient"])
    np.testing.assert_allclose([gamma_k, coupling_k], [[epochs, [0.01, 0.02, 0.03, 0.04]], [epochs, [0.5, 1, 1.5, 2]]])
    assert {axes.get_yscale() for axes in panels.values()} == {"log"}


def test_distance_is_plotted_at_the_round_it_was_measured(write):
    _, panels = drawn(write(events()))
    *replicas, rms = curves(panels["distance"])
    np.testing.assert_allclose(rms, [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
    np.testing.assert_allclose(replicas, [[[0.1, 0.2, 0.3, 0.4], [0.5] * 4]] * 2)


def test_long_curves_are_averaged_over_neighbors(write):
    replicas = 2
    count = 10 * plot.MAX_POINTS
    log = [start(), *(round_event(k) for k in range(1, count + 1))]
    log += [eval_event(k, replicas, replica_errors=[float(k)] * replicas) for k in range(1, count + 1)]
    _, panels = drawn(write(log))
    assert len(panels["error"].lines) == replicas + 2
    means = [10 * i + 5.5 for i in range(plot.MAX_POINTS)]
    np.testing.assert_allclose(curves(panels["error_time"])[0], [[2 * mean for mean in means], means])
    assert {len(line.get_xdata()) for axes in panels.values() for line in axes.lines} == {plot.MAX_POINTS}


@pytest.mark.parametrize(("lowest", "scale"), [(0.5, "log"), (0.0, "linear"), (None, "log")])
def test_zero_error_makes_the_scale_linear(lowest, scale, write):
    log = events()
    log[-2]["master_error"] = lowest
    _, panels = drawn(write(log))
    assert panels["error"].get_yscale() == panels["error_time"].get_yscale() == scale
    assert panels["loss"].get_yscale() == "log"


def test_panels_without_data_are_marked(write):
    zeros = dict(gamma_k=0.0, coupling_k=0.0, replica_distance_rms=0.0)
    figure, panels = drawn(write([start(), *(round_event(k, **zeros) for k in (1, 2))]))
    assert {name for name, axes in panels.items() if axes.texts} == {"error", "error_time", "distance", "coefficient"}
    assert np.isfinite(panels["loss"].lines[0].get_ydata()).all()
    figure.set_layout_engine("none")
    figure.draw_without_rendering()


def test_fully_diverged_run_can_be_drawn(write):
    diverged = [round_event(1, train_loss=None, replica_distance_rms=None), eval_event(1, master_error=None)]
    figure, _ = drawn(write([start(), *diverged]))
    figure.set_layout_engine("none")
    figure.draw_without_rendering()


def test_restarted_replica_is_marked(write):
    log = [start(), round_event(2), {"event": "nonfinite", "round": 3, "replicas": [0]}, round_event(4)]
    _, panels = drawn(write(log))
    marks = {
        name: float(line.get_xdata()[0])
        for name, axes in panels.items()
        for line in axes.lines
        if line.get_marker() == "x"
    }
    assert marks == pytest.approx(dict(error=0.3, error_time=6.0, loss=0.3, loss_time=6.0, distance=0.3))
    assert len(panels["loss"].get_legend().get_texts()) == 1


@pytest.mark.parametrize("count", [10, 30])
def test_overlaid_runs_have_distinct_colors_and_labels(count, write):
    folders = [write(events(1, seed=seed), f"run{seed}") for seed in range(count)]
    figure, panels = drawn(*folders)
    colors = [tuple(np.atleast_1d(line.get_color())) for line in panels["loss"].lines]
    assert len(set(colors)) == len(colors) == count
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"seed={seed}" for seed in range(count)]
    title = figure.get_suptitle()
    assert all(word in title for word in ("lenet", "mnist", "parle")) and "seed" not in title
    if count == 30:  # they fit
        figure.draw_without_rendering()
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
        assert min(axes.get_window_extent().height for axes in panels.values()) > 100


def test_title_of_one_run_has_its_settings(write):
    figure, _ = drawn(write(events()))
    assert all(word in figure.get_suptitle() for word in ("lenet", "mnist", "parle", "n=2", "L=25", "seed=42"))
    assert not figure.legends


# The program


def test_file_format_follows_the_suffix_and_files_are_small(write, tmp_path):
    figure, _ = drawn(*(write(events(300, seed=seed), f"run{seed}") for seed in range(2)))
    for suffix, begins in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        out = tmp_path / f"figure{suffix}"
        plot.save(figure, out)
        content = out.read_bytes()
        assert content.startswith(begins)
        assert len(content) < 100_000
        figure.set_layout_engine("none")  # it has been laid out


def test_figure_is_written_beside_the_first_log_or_to_out(write, main, monkeypatch, tmp_path):
    first, second = write(events()), write(events(seed=1), "other")
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure) or path.touch())
    assert main(first, second) == (0, f"{first / 'plot.png'}\n", "")
    assert [len(figure.axes[2].lines) for figure in figures] == [2]
    assert {path.name for path in first.iterdir()} == {"log.jsonl", "plot.png"}
    assert {path.name for path in second.iterdir()} == {"log.jsonl"}
    for suffix in (".svg", ".pdf"):
        out = tmp_path / f"figure{suffix}"
        assert main(first, "-o", out) == (0, f"{out}\n", "")
        assert out.exists()


def test_directories_in_labels_may_have_any_name(write, main):
    status, _, err = main(*(write(events(), name) for name in ("_first", "$x^$", os.fsdecode(b"run\xff"))))
    assert (status, err) == (0, "")


def test_the_users_matplotlib_settings_do_not_matter(write, main, monkeypatch, python):
    colors = []
    monkeypatch.setattr(plot, "save", lambda figure, path: colors.append(figure.axes[0].get_facecolor()))
    with matplotlib.rc_context({"axes.facecolor": "red", "text.usetex": True}):
        assert main(write(events()))[0] == 0
    assert colors == [matplotlib.colors.to_rgba("white")]
    done = python("-m", "parle.plot", "-h", MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["RUN"]),
        (("RUN", "nowhere"), ["nowhere/log.jsonl"]),
        (("RUN", "-o", "figure.gif"), ["-o", "figure.gif", ".png", ".svg", ".pdf"]),
        (("RUN", "-o", "figure"), ["-o", "figure", ".png", ".svg", ".pdf"]),
        (("RUN", "-o", "nowhere/figure.png"), ["-o", "nowhere/figure.png"]),
        (("RUN", "--ouput", "figure.png"), ["--ouput", "--out"]),
    ],
)
def test_usage_error_is_one_line_and_exit_status_2(arguments, words, write, main, tmp_path):
    folder = write(events())
    status, out, err = main(*(folder if argument == "RUN" else argument for argument in arguments))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "plot" in err.split(":")[0] and all(word in err for word in words)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"log.jsonl"}


@pytest.mark.slow
def test_log_of_a_real_run_can_be_drawn(main, proc, monkeypatch, python):
    settings = ("-d", "digits", "-n", 2, "-L", 2, "-B", 0.5, "-b", 64, "--proc", proc, "--out", "run")
    monkeypatch.setattr(sys, "argv", ["parle_gpu.py", *map(str, settings)])
    parle_gpu.main()
    run = Path("run").resolve()
    done = python("-m", "parle.plot", run, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run}/plot.png\n", "")
    _, panels = drawn(run)
    assert all(len(axes.lines) > 0 for axes in panels.values())
