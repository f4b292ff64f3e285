"""Make the tables of README.md and benchmarks/README.md, and the figures, anew from what results/ keeps.

A table stands between <!-- MODULE.FUNCTION --> and <!-- end -->: what that function gives, and a line on the rows it is
made of. A figure is drawn by draw() of its module, and only where other rows are kept than it shows.
"""

import importlib
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import record

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
FIGURES = {"claim": "claim", "sweeps": "claim", "flatness": "flatness", "network": "network", "peers": "peers"}
MARK = r"<!-- (\w+)\.(\w+) -->\n"


def filled(text: str) -> str:
    """`text` with its tables as they are to be."""

    def fill(table: re.Match[str]) -> str:
        module = importlib.import_module(f"benchmarks.{table[2]}")
        return f"{table[1]}\n{getattr(module, table[3])()}\n\n{record.about(table[2])}\n\n"

    text, count = re.subn(rf"({MARK})(?:(?!<!--).)*(?=<!-- end -->)", fill, text, flags=re.DOTALL)
    if count != len(re.findall(MARK, text)):
        raise ValueError("a table has no <!-- end -->")
    return text


if __name__ == "__main__":
    for path in FILES:
        path.write_text(filled(path.read_text()))
    for question in {question for name, question in FIGURES.items() if record.shown(name) != record.digest(question)}:
        importlib.import_module(f"benchmarks.{question}").draw()
