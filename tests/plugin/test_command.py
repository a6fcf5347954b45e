"""What a console command does with an error, and without a reader."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from ap_fairseq.cli.common import command
from ap_fairseq.files import ArtifactError, UserError

@command
def main(argv):
    exec(argv[0])

main()
"""


def run(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", PROGRAM, code], text=True, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise UserError('--total is 2')", "error: --total is 2"),
        ("raise ArtifactError('masks.st is damaged')", "error: masks.st is damaged"),
        ("open('/nowhere/file')", "error: [Errno 2] No such file or directory: '/nowhere/file'"),
    ],
)
def test_what_the_user_can_mend_is_one_line(code, message):
    done = run(code)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith(message)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("code", ["int('x')", "raise OSError('no file named')", "raise BrokenPipeError"])
def test_a_bug_keeps_its_traceback(code):
    """Every ValueError, also of numpy, torch and our own code, was printed as if the user had caused it."""
    done = run(code, stdout=subprocess.PIPE)
    assert done.returncode == 1 and "Traceback" in done.stderr and "error: " not in done.stderr


@pytest.mark.parametrize("code", ["print('word ' * 10**6)", "print('x'); sys.exit(0)"], ids=["while", "at the end"])
def test_a_reader_that_leaves_ends_the_command_silently(code):
    """`| head -1` ended in a BrokenPipeError; other tools die of SIGPIPE without a word."""
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as gone:
        gone.wait()
        done = run(code, stdout=gone.stdin)
    assert done.returncode == 128 + 13
    assert len(done.stderr.splitlines()) == 1  # the call


def test_a_closed_standard_output_is_no_fault():
    """`>&-` leaves Python without sys.stdout."""
    done = subprocess.run(
        ["bash", "-c", '"$@" >&-', "bash", sys.executable, "-c", PROGRAM, "print('x')"],
        text=True,
        stderr=subprocess.PIPE,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_an_interrupt_is_one_line():
    done = run("raise KeyboardInterrupt")
    assert done.returncode == 130 and done.stderr.splitlines()[-1].endswith(": interrupted")
    assert "Traceback" not in done.stderr
