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


def test_metrics_of_classification_are_imported_where_they_are_called():
    """fairseq imports scikit-learn and SciPy for two modules: five of the seconds that a cold start took."""
    code = """
import sys
import ap_fairseq.cli.generate
print(*{"sklearn", "scipy", "pandas"} & sys.modules.keys())
import numpy as np
from fairseq.criterions.sentence_prediction import acc_and_f1, pearson_and_spearman
from fairseq.tasks import audio_classification
guess, label = np.array([1, 0, 1, 1]), np.array([1, 1, 1, 0])
print(round(acc_and_f1(guess, label)["f1"], 4), round(pearson_and_spearman(guess, label)["corr"], 4))
print(audio_classification.sklearn_metrics.accuracy_score(label, guess))
import scipy.stats, sklearn.metrics
print(scipy.stats.t.ppf(0.5, 3), sklearn.metrics.f1_score.__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["", "0.6667 -0.3333", "0.5", "0.0 sklearn.metrics._classification"]
