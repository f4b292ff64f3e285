"""Append measurements to results/NAME.jsonl, one JSON object per line, and read them back.

NAME is the module that measures. A row holds the numbers, the command, the seed and the machine, and (since f92da53)
the revision. Files of rows are never rewritten: `read_rows` translates the names that older rows use.
"""

import hashlib
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent / "figures"
DIRECTORY_FLAGS = {"--data", "--proc", "--runs", "--checkpoints"}

# Names in the rows of older revisions → names of today. Keys are translated at every depth of a row.
OLD_KEYS: dict[str, dict[str, str]] = {
    "compare_methods": {
        "setting": "config",
        "longer": "length",
        "outer_step": "outer_lr",
        "scoping": "scoping_rate",
        "inner_drops": "decay_inner_lr",
        "keeps_momentum": "keep_inner_momentum",
        "collapses": "reset_replicas",
        "batches": "steps",
        "gradients": "gradient_evaluations",
        "distance": "replica_distance",
        "lost": "nonfinite",
    },
    "baselines": {
        "outer_step": "outer_lr_scale",
        "drops": "lr_drops",
        "decay": "lr_decay",
        "warmup": "warmup_steps",
        "batches": "steps",
        "train_images": "num_train_images",
        "bytes": "bytes_sent",
    },
    "fault_tolerance": {
        "round": "fault_after_round",
        "saved": "saved_round",
        "status": "exit_status",
        "resumed": "resumed_exit_status",
        "same": "bitwise_identical",
    },
    "reproduce_paper": {"row": "experiment", "images": "images_seen", "mini_batch_seconds": "step_seconds"},
    "bandwidth": {"minibatches": "steps"},
    "readme_results": {
        "replicas": "num_replicas",
        "rounds": "num_rounds",
        "seconds": "train_seconds",
        "wait_seconds": "straggler_seconds",
    },
    "flatness": {"of": "subject", "radius": "noise"},
    "throughput": {
        "part": "measurement",
        "alone": "forward_backward",
        "plain": "reference_loop",
        "message": "communication",
    },
}
OLD_VALUES: dict[str, dict[tuple[str, str], str]] = {
    "baselines": {("method", "published"): "published script"},
    "fault_tolerance": {
        ("fault", "a rank stalls, `--timeout 2`"): "a rank hangs, `--timeout 2`",
        ("fault", "SIGTERM to `parle_gpu.py`"): "SIGTERM, `parle_gpu.py`",
    },
    "flatness": {
        ("subject", "SGD"): "SGD, matched steps",
        ("subject", "SGD, as many gradients"): "SGD, matched compute",
        ("subject", "master to SGD, as many gradients"): "master to SGD, matched compute",
    },
}

# Version 1 of the log: event → its name in version 2, and the names of the keys that benchmarks read
OLD_EVENTS: dict[str, tuple[str, dict[str, str]]] = {
    "start": ("start", {"replicas": "num_replicas", "rounds": "num_rounds"}),
    "end": ("finished", {"seconds": "train_seconds", "images": "images_seen", "wait_seconds": "straggler_seconds"}),
}


# Rows


def provenance() -> dict[str, str | None]:
    """Return the command, machine and revision of a row. Call it before measuring, since files may change meanwhile."""
    from parle import logger

    return dict(command=command_line(), machine=machine(), revision=logger.revision())


def machine() -> str:
    """Return the processor and the versions that a number depends on, in one line."""
    import torch

    from parle.cores import count_cores

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.machine()
    cores = count_cores()
    return f"{cores} cores of {cpu.strip()}, Python {platform.python_version()}, torch {torch.__version__}"


def command_line() -> str:
    """Return the command, with DIR for this machine's directories."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    for index, word in enumerate(words[:-1]):
        if word in DIRECTORY_FLAGS:
            words[index + 1] = "DIR"
    return shlex.join(words)


def read_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of results/NAME.jsonl, oldest first, under the names of today."""
    path = RESULTS / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [translate(json.loads(line), OLD_KEYS.get(name, {}), OLD_VALUES.get(name, {})) for line in lines]


def translate(row: dict[str, Any], keys: dict[str, str], values: dict[tuple[str, str], str]) -> dict[str, Any]:
    translated = {}
    for old, value in row.items():
        key = keys.get(old, old)
        if isinstance(value, dict):
            value = translate(value, keys, values)
        elif isinstance(value, str):
            value = values.get((key, value), value)
        translated[key] = value
    return translated


def exists(name: str) -> bool:
    return (RESULTS / f"{name}.jsonl").exists()


def append_row(name: str, row: dict[str, Any]) -> None:
    """Append a row to results/NAME.jsonl. Only one process may write."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def digest(name: str) -> str:
    """Return the checksum of results/NAME.jsonl."""
    return hashlib.sha256((RESULTS / f"{name}.jsonl").read_bytes()).hexdigest()


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the events of a run's log.jsonl under the names of today, without a last line that was cut off."""
    path = run / "log.jsonl"
    events = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    if not events or "log_version" in events[0]:
        return events
    upgraded = []
    for event in events:
        name, keys = OLD_EVENTS.get(event["event"], (event["event"], {}))
        upgraded.append(translate(event, keys, {}) | {"event": name})
    return upgraded


def nothing_to_run(name: str) -> str:
    return f"Nothing to run: all rows exist. To repeat the measurements, move {RESULTS / name}.jsonl away"


# Tables and figures


def mean_std(values: Sequence[float], digits: int = 2) -> str:
    """Format mean ± sample standard deviation; a single value has no ±."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def source_note(name: str) -> str:
    """Return the line below a table: where its rows are and which machine measured them."""
    rows = read_rows(name)
    machines = "; ".join(dict.fromkeys(row["machine"] for row in rows))
    return f"Source: `benchmarks/results/{name}.jsonl` ({len(rows)} rows with command and seed). Machine: {machines}."


def save_figure(figure: "Figure", file: str, name: str, dpi: int) -> None:
    """Save figures/FILE.png with the checksum of the rows of NAME in its metadata."""
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{file}.png", dpi=dpi, metadata={"Rows": digest(name)})


def figure_digest(file: str) -> str | None:
    """Return the checksum of the rows that figures/FILE.png shows."""
    from PIL import Image

    path = FIGURES / f"{file}.png"
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get("Rows")
