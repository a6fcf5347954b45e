"""What a console command does with an error, and without a reader."""

import importlib
import signal
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


def heed_interrupts() -> None:
    """In a new process: a shell lets what it starts with & ignore them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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
    """`| head -1` ended in a BrokenPipeError; other tools die of SIGPIPE silently."""
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


@pytest.mark.parametrize("begun", [False, True], ids=["while it is imported", "while it runs"])
def test_an_interrupt_ends_a_command_without_a_traceback(begun):
    """In the seconds of its imports, it printed the traceback of one of them."""
    interrupt = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
    imported = "import sys; sys.argv[0] = '/bin/ap-masks'; import ap_fairseq.cli"
    done = subprocess.run(
        [sys.executable, "-c", f"{imported}\n{PROGRAM if begun else interrupt}", interrupt],
        text=True,
        stderr=subprocess.PIPE,
        preexec_fn=heed_interrupts,
    )
    if begun:
        assert done.returncode == 130 and done.stderr.splitlines()[-1] == "ap-masks: interrupted"
    else:
        assert done.returncode == -signal.SIGINT and not done.stderr  # which a shell calls 130


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_that_arrives_in_a_finalizer_ends_the_command(number, status):
    """Python drops exceptions there: after SIGINT the command went on."""
    finalizer = f"weakref.finalize(set(), os.kill, os.getpid(), signal.{number})"
    done = run(f"import os, signal, time, weakref; {finalizer}; time.sleep(9); sys.exit(7)", preexec_fn=heed_interrupts)
    assert done.returncode == status and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", "apply average evaluate generate masks prune_schedule record report".split())
def test_a_mistyped_call_is_one_line(name, capsys):
    """It was the last of up to 130 lines of usage."""
    words = ["a", "b", "--path", "c", "--output", "d", "--updates", "1", "--masks", "e", "--no-such-flag"]
    if name == "record":  # which leaves the others to fairseq
        words.remove("--path")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"ap_fairseq.cli.{name}").main(words)
    printed = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "usage:" not in printed
    _, error = printed  # after the call
    assert ": error: " in error and error.endswith(" --help")


def test_a_command_looks_for_no_garbage_among_its_imports():
    """That took an eighth of their time. A program that imports a command keeps its own setting."""
    code = "import gc, sys; sys.argv[0] = {!r}; import ap_fairseq.cli; print(gc.isenabled())\n"
    code += "from ap_fairseq.cli.common import command\n"
    code += "command(lambda _: print(gc.isenabled(), gc.get_freeze_count() > 0))([])"
    for program, expected in (("/bin/ap-masks", "False\nTrue True\n"), ("/bin/mine", "True\nTrue False\n")):
        done = subprocess.run([sys.executable, "-c", code.format(program)], text=True, stdout=subprocess.PIPE)
        assert done.stdout == expected


@pytest.mark.parametrize(
    ("end", "status", "expected"), [("", 0, "at exit"), ("raise UserError", 2, "at exit freed")], ids=["done", "failed"]
)
def test_a_command_that_succeeds_ends_without_freeing_what_it_imported(end, status, expected, tmp_path):
    """That took a tenth of a second. What is to be called at the end, or flushed, still is; a fault ends as ever."""
    program = tmp_path / "ap-masks"
    program.write_text(
        f"""
import atexit
atexit.register(print, " freed", end="")  # before the command's own, so called after it
import ap_fairseq.cli
import sys
from ap_fairseq.cli.common import command
from ap_fairseq.files import UserError

atexit.register(print, "at exit", end="")

@command
def main(argv):
    {end or "pass"}

sys.exit(main())
"""
    )
    done = subprocess.run([sys.executable, program], text=True, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (status, expected)


def test_processes_that_a_command_spawns_collect_garbage(tmp_path):
    """They import its program, as it did, and nobody turned it on again: with AP_START_METHOD=spawn they never did."""
    program = tmp_path / "ap-masks"
    program.write_text(
        "import ap_fairseq.cli\n"
        "if __name__ == '__main__':\n"
        "    import gc, multiprocessing\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(gc.isenabled(), pool.apply(gc.isenabled))\n"
    )
    done = subprocess.run([sys.executable, program], text=True, stdout=subprocess.PIPE)
    assert done.stdout == "False True\n"


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
