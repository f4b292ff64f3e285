"""The pages in docs/: links, flags and the tables of log events."""

import re
import signal
import sys

import pytest

import parle_gpu
import parle_mpi
from benchmarks import results
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVENTS = ["start", "resume", "round", "eval", "nonfinite", "checkpoint_failed", "interrupted", "finished"]


def documented_fields(program):
    """Return event → the keys that docs/logs.md lists for "parle_mpi.py" or "parle_gpu.py", without `event` itself."""
    sections = re.split(r"^## `(\w+)`\n", (ROOT / "docs" / "logs.md").read_text(), flags=re.MULTILINE)[1:]
    fields = {}
    for event, text in zip(sections[::2], sections[1::2], strict=True):
        rows = re.findall(r"^\| `(\w+)` \| (both|`[\w.]+`) \|", text, re.MULTILINE)
        fields[event] = [name for name, programs in rows if programs.strip("`") in ("both", program)]
    fields["resume"] = fields["start"] + fields["resume"]
    return fields


def anchors(page):
    """Return the anchors of the headings of `page`, as GitHub forms them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture
def run_program(monkeypatch, no_launcher):
    """Run parle_gpu.py in this process."""

    def run_program(*arguments):
        monkeypatch.setattr(sys, "argv", ["parle_gpu.py", *map(str, arguments)])
        parle_gpu.main()

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    handler = signal.getsignal(signal.SIGUSR1)
    yield run_program
    signal.signal(signal.SIGUSR1, handler)


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


def test_flags_of_help_and_pages_agree(monkeypatch, capsys, no_launcher):
    for program in (parle_gpu, parle_mpi):
        monkeypatch.setattr(sys, "argv", [program.__name__, "-h"])
        with pytest.raises(SystemExit):
            program.main()
    known = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", capsys.readouterr().out))
    page = (ROOT / "docs" / "running.md").read_text()
    table = re.findall(r"^\| (`-.*?) \|", page, re.MULTILINE)
    assert {flag for row in table for flag in re.findall(r"`(--?[A-Za-z][\w-]*)`", row)} == known
    pages = [page for page in PAGES if page.name != "results.md" and page.parent.name != "benchmarks"]
    named = {flag for page in pages for flag in re.findall(r"(?<!\w)`(--?[A-Za-z][\w-]*)", page.read_text())}
    assert named - {"--signal", "-W", "-K", "--shutdown-timeout"} <= known  # of srun and torchrun


def test_every_event_has_documented_fields():
    for program in ("parle_mpi.py", "parle_gpu.py"):
        fields = documented_fields(program)
        assert list(fields) == EVENTS
        assert all(names and len(set(names)) == len(names) for names in fields.values())


def test_log_has_exactly_the_documented_fields(run_program, monkeypatch, tmp_path, proc):
    monkeypatch.setenv("PARLE_FAULT", "nan:1:1")
    tiny = ("-d", "digits", "-n", 2, "-L", 2, "-b", 72, "--frac", 0.1, "--device", "cpu", "--proc", proc)
    run_program(*tiny, "--master-average", 0.5, "-B", 1, "--eval-every", 1, "--out", tmp_path)
    run_program("--resume", tmp_path, "-B", 1.5)
    events = results.read_log(tmp_path)
    names = ["start", "nonfinite", "round", "eval", "round", "eval", "resume", "round", "eval", "finished"]
    assert [event["event"] for event in events] == names
    fields = documented_fields("parle_gpu.py")
    in_last_eval = {name for name in fields["eval"] if name.startswith("running_stats_")}
    for index, event in enumerate(events):
        expected = {"event", *fields[event["event"]]} - (in_last_eval if index == 3 else set())
        assert event.keys() == expected, f"{event['event']} of line {index + 1}"
