"""Standard streams that are closed, full, or cannot encode a character."""

import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT, outside

PREPARE = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from parle import streams; streams.prepare_streams(); "


def shell(program, redirected="", **environment):
    """Run a Python program in a shell that redirects its streams; return its exit status, stdout and stderr."""
    line = f"{shlex.join([sys.executable, '-c', program])} {redirected}"
    done = subprocess.run(["sh", "-c", line], env=outside(environment), capture_output=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("redirected", "out", "err"), [("", b"out\n", b"err\n"), (">&-", b"", b"err\n"), ("2>&-", b"out\n", b"")]
)
def test_a_closed_stream_discards_output(redirected, out, err):
    program = PREPARE + "print('out'); print('err', file=sys.stderr); sys.exit(75)"
    assert shell(program, redirected) == (75, out, err)


def test_a_new_file_does_not_become_a_standard_stream():
    program = PREPARE + "sys.exit(os.open(os.devnull, os.O_RDONLY))"
    status, _, _ = shell(program, "<&- >&- 2>&-")
    assert status > 2


@pytest.mark.parametrize(
    ("encoding", "expected"), [("utf-8", "é…\n".encode()), ("latin-1", b"\xe9?\n"), ("ascii:strict", b"??\n")]
)
def test_characters_that_a_stream_cannot_encode_become_question_marks(encoding, expected):
    program = PREPARE + "text = '\\u00e9\\u2026'; print(text); print(text, file=sys.stderr)"
    assert shell(program, PYTHONIOENCODING=encoding) == (0, expected, expected)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_file_name_that_is_not_utf8_is_printed_as_it_is(encoding):
    program = PREPARE + "name = os.fsdecode(b'run\\xff'); print(name); print(name, file=sys.stderr)"
    assert shell(program, PYTHONIOENCODING=encoding) == (0, b"run\xff\n", b"run\xff\n")


@pytest.mark.parametrize("target", ["/dev/full", "closed.pipe"])
def test_output_that_cannot_be_written_does_not_change_the_exit_status(target, tmp_path):
    program = (
        PREPARE
        + f"""
if {target!r} == "closed.pipe":
    reads, writes = os.pipe()
    os.close(reads)
    os.dup2(writes, 1), os.dup2(writes, 2)
streams.print_line("out")
with streams.ignore_write_errors(sys.stderr):
    print("err", file=sys.stderr)
sys.exit(75)
"""
    )
    assert shell(program, ">/dev/full 2>/dev/full") == (75, b"", b"")


@pytest.mark.parametrize("program", ["parle_mpi.py", "parle_gpu.py", "-m parle.doctor", "-m parle.plot"])
def test_programs_exit_with_the_same_status_if_stderr_is_closed(program):
    line = f"{sys.executable} {program} --wrong 2>&-"
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, env=outside({}), capture_output=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, b"")
