"""Update the tables and figures of README.md, docs/ and benchmarks/README.md from benchmarks/results/.

    python benchmarks/update_tables.py

A table stands between <!-- MODULE.FUNCTION --> and <!-- end -->: the Markdown that FUNCTION of benchmarks/MODULE.py
returns, followed by a line that names its source, unless the table has notes of its own. A figure is redrawn by draw()
of its module, and only if the rows have changed since it was drawn.
"""

import importlib
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import results

ROOT = Path(__file__).parent.parent
FIGURES = {  # figure → module that draws it
    "compare_methods": "compare_methods",
    "sweeps": "compare_methods",
    "baselines": "baselines",
    "time_to_error": "time_to_error",
    "bandwidth": "bandwidth",
    "flatness": "flatness",
}
MARKER = r"<!-- (\w+)\.(\w+) -->\n"
WITH_NOTES = {("readme_results", "headline")}  # tables that name their sources


def pages() -> list[Path]:
    """Return the Markdown files that contain a table to fill."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
    return [path for path in files if path.exists() and re.search(MARKER, path.read_text())]


def fill(text: str) -> str:
    """Return `text` with all of its tables up to date."""

    def replace(match: re.Match[str]) -> str:
        marker, name, function = match[1], match[2], match[3]
        table = getattr(importlib.import_module(f"benchmarks.{name}"), function)()
        note = "" if (name, function) in WITH_NOTES else f"{results.source_note(name)}\n\n"
        return f"{marker}\n{table}\n\n{note}"

    text, count = re.subn(rf"({MARKER})(?:(?!<!--).)*(?=<!-- end -->)", replace, text, flags=re.DOTALL)
    if count != len(re.findall(MARKER, text)):
        raise ValueError("a table has no <!-- end -->")
    return text


def main() -> None:
    for path in pages():
        path.write_text(fill(path.read_text()))
    for name in {name for file, name in FIGURES.items() if results.figure_digest(file) != results.digest(name)}:
        importlib.import_module(f"benchmarks.{name}").draw()


if __name__ == "__main__":
    main()
