"""The pages in docs/: links, flags and the tables of log events."""

import re

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVENTS = ["start", "resume", "round", "eval", "nonfinite", "checkpoint_failed", "interrupted", "finished"]


def documented_fields(program):
    """Event → the keys that docs/logs.md gives it for "parle_mpi.py" or "parle_gpu.py"; `event` itself left out."""
    sections = re.split(r"^## `(\w+)`\n", (ROOT / "docs" / "logs.md").read_text(), flags=re.MULTILINE)[1:]
    fields = {}
    for event, text in zip(sections[::2], sections[1::2], strict=True):
        rows = re.findall(r"^\| `(\w+)` \| (both|`[\w.]+`) \|", text, re.MULTILINE)
        fields[event] = [name for name, programs in rows if programs.strip("`") in ("both", program)]
    fields["resume"] = fields["start"] + fields["resume"]
    return fields


def anchors(page):
    """What a link to a heading of `page` may name, as GitHub forms it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in readme] == []


def test_flags_of_help_and_pages_agree(python):
    done = python("parle_gpu.py", "-h")
    known = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", done.stdout))
    page = (ROOT / "docs" / "running.md").read_text()
    table = re.findall(r"^\| (`-.*?) \|", page, re.MULTILINE)
    assert {flag for row in table for flag in re.findall(r"`(--?[A-Za-z][\w-]*)`", row)} == known
    pages = [page for page in PAGES if page.name != "results.md" and page.parent.name != "benchmarks"]
    named = {flag for page in pages for flag in re.findall(r"(?<!\w)`(--?[A-Za-z][\w-]*)", page.read_text())}
    assert named - {"--signal"} <= known  # Slurm's


def test_every_event_has_documented_fields():
    for program in ("parle_mpi.py", "parle_gpu.py"):
        fields = documented_fields(program)
        assert list(fields) == EVENTS
        assert all(names and len(set(names)) == len(names) for names in fields.values())
