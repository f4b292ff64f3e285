"""Write the tables of README.md and benchmarks/README.md anew from what results/ keeps.

A table stands between <!-- MODULE.FUNCTION --> and <!-- end -->, and is what that function gives.
"""

import importlib
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]


def filled(text: str) -> str:
    """`text` with its tables as they are to be."""

    def fill(mark: re.Match[str]) -> str:
        module = importlib.import_module(f"benchmarks.{mark[2]}")
        return f"{mark[1]}\n{getattr(module, mark[3])()}\n\n"

    return re.sub(r"(<!-- (\w+)\.(\w+) -->\n).*?(?=<!-- end -->)", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    for path in FILES:
        path.write_text(filled(path.read_text()))
