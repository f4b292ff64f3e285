"""Keep what a benchmark measured, a line of JSON each in results/QUESTION.jsonl, and what is made of them."""

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


def origin() -> dict[str, str | None]:
    """Of a row: what was typed, and where; to be asked for before what is measured begins, since files may change."""
    import report

    return dict(command=command(), machine=machine(), revision=report.revision())


def machine() -> str:
    """The processor and the versions that a number depends on, in one line."""
    import torch

    import ranks

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.machine()
    return f"{len(ranks.cores())} cores of {cpu.strip()}, Python {platform.python_version()}, torch {torch.__version__}"


def command() -> str:
    """What was typed."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def read(question: str) -> list[dict[str, Any]]:
    """The rows kept so far, oldest first."""
    path = RESULTS / f"{question}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def log(folder: Path) -> list[dict[str, Any]]:
    """The events of a run so far: behind the last newline is what was being written when it was broken off."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def keep(question: str, row: dict[str, Any]) -> None:
    """Add a row. One process writes: a benchmark's first."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{question}.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def digest(question: str) -> str:
    """Of the rows kept so far."""
    return hashlib.sha256((RESULTS / f"{question}.jsonl").read_bytes()).hexdigest()


def about(question: str) -> str:
    """A line to stand under a table."""
    rows = read(question)
    machines = "; ".join(dict.fromkeys(row["machine"] for row in rows))
    return f"{len(rows)} rows of results/{question}.jsonl, each with its command and seed. Machine: {machines}."


def complete(question: str) -> str:
    """What to say where nothing is left to measure."""
    return f"All rows are there: move {RESULTS / question}.jsonl away to measure anew"


def save(figure: "Figure", name: str, question: str, dpi: int) -> None:
    """As figures/NAME.png, which holds the digest of the rows that it shows."""
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{name}.png", dpi=dpi, metadata={"Rows": digest(question)})


def shown(name: str) -> str | None:
    """The digest of the rows that a figure shows."""
    from PIL import Image

    path = FIGURES / f"{name}.png"
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get("Rows")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """mean ± standard deviation of the sample; of a single value no ±."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
