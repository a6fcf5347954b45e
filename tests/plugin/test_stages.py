"""Stages run once, resume, refuse other settings, and show how far they are."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from plugin.commands import ROOT, TINY

from ap_fairseq.experiments.stages import PLUGIN, StageError, Stages, read_mark, run_together
from ap_fairseq.files import ArtifactError, UserError
from ap_fairseq.progress import Progress, State, read_state


def read(path):
    print(Path(path).read_text())


def test_a_failed_stage_shows_its_log_and_runs_again(tmp_path, capsys):
    stages = Stages(tmp_path)
    with pytest.raises(StageError, match="stage x failed(.|\n)*No such file(.|\n)*missing"):
        stages.run("x", read, str(tmp_path / "missing"))
    (tmp_path / "missing").write_text("now")
    stages.run("x", read, str(tmp_path / "missing"))
    (tmp_path / "missing").unlink()
    stages.run("x", read, str(tmp_path / "missing"))
    assert "x: done before" in capsys.readouterr().out
    with pytest.raises(ArtifactError, match="stage x in .* was done with other settings"):
        stages.run("x", read, str(tmp_path / "other"))


def refuse():
    raise UserError("--frobnicate 2 is too much; give 1")


def test_what_the_user_can_mend_is_one_line_of_the_log(tmp_path):
    """A traceback of thirty lines hid it."""
    stages = Stages(tmp_path)
    with pytest.raises(StageError, match="error: --frobnicate 2 is too much; give 1"):
        stages.run("x", refuse)
    assert len(stages.log("x").read_text().splitlines()) == 1


def test_ranks_of_torchrun_are_refused(tmp_path, monkeypatch):
    """ap-prune-schedule waited for ever: a rank for the stage, the other, which recorded, for the first."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs once, not as 2 ranks of torchrun"):
        Stages(tmp_path)


def test_a_log_holds_one_run(tmp_path):
    """A repeated stage was appended to the log of the failed one, and a translation read twice."""
    stages, file = Stages(tmp_path), tmp_path / "text"
    for text in ("first", "second"):
        file.write_text(text)
        stages.run_always("x", read, str(file))
    assert stages.log("x").read_text() == "second\n"
    assert (tmp_path / "logs" / "x.previous.log").read_text() == "first\n"


def test_a_command_leaves_its_command_line_in_log_and_mark(tmp_path):
    stages = Stages(tmp_path)
    stages.run("help", "ap-masks", "--help")
    log = stages.log("help").read_text()
    assert log.startswith("$ ap-masks --help\n") and "usage: ap-masks" in log
    command, seconds = read_mark(tmp_path / "stages" / "help.json")
    assert command == ["ap-masks", "--help"] and seconds >= 0
    with pytest.raises(StageError, match="status 2(.|\n)*unrecognized arguments: --frobnicate"):
        stages.run("bad", "ap-masks", "x", "--frobnicate", "-o", "y")
    with pytest.raises(UserError, match="no command ap-nothing is installed"):
        stages.run("nothing", "ap-nothing")
    assert [path.name for path in (tmp_path / "stages").iterdir()] == ["help.json"]


def test_a_damaged_mark_is_named(tmp_path):
    stages = Stages(tmp_path)
    stages.run("x", read, str(ROOT / "setup.py"))
    for text in ("12.5\nfairseq-train", "{}", '{"command": ["x"], "seconds": null}'):
        (tmp_path / "stages" / "x.json").write_text(text)
        with pytest.raises(ArtifactError, match="x.json is not the mark of a finished stage"):
            stages.run("x", read, str(ROOT / "setup.py"))


def test_a_stage_runs_once_for_programs_that_want_it_at_the_same_time(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from ap_fairseq.experiments.stages import Stages
def slow(path):
    import time
    time.sleep(1)
    open(path, "a").write("done\\n")
Stages({str(tmp_path)!r}).run("x", slow, {str(tmp_path / "made")!r})
"""
    command = [sys.executable, "-c", code]
    programs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = "".join(program.communicate(timeout=100)[0] for program in programs)
    assert [program.returncode for program in programs] == [0, 0]
    assert printed.count("x: running") == 1 and printed.count("x: done before") == 1
    assert (tmp_path / "made").read_text() == "done\n"


def test_a_terminated_program_takes_its_stages_with_it(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from ap_fairseq.files import atomic_output
from ap_fairseq.cli.common import exit_on_sigterm
from ap_fairseq.experiments.stages import Stages, run_together
def slow(path):
    import time
    with atomic_output(path) as temporary:
        temporary.write_text("half")
        time.sleep(60)
exit_on_sigterm()
run_together(1, [(Stages({str(tmp_path)!r}).run, ["x", slow, {str(tmp_path / "made")!r}])])
"""
    with subprocess.Popen([sys.executable, "-c", code]) as program:
        while not list(tmp_path.glob(".made.*.tmp")) and program.poll() is None:
            time.sleep(0.1)
        started = time.monotonic()
        program.terminate()
        assert program.wait(timeout=60) == 143 and time.monotonic() - started < 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "stages"] and not os.listdir(
        tmp_path / "stages"
    )


def append(path, text):
    with open(path, "a") as stream:
        stream.write(f"{text}\n")
    if text == "3":
        raise StageError("the third")


def test_tasks_run_together_and_one_that_fails_does_not_end_the_others(tmp_path, capfd):
    with pytest.raises(StageError, match="1 jobs failed, .* the same command goes on"):
        run_together(2, [(append, [tmp_path / "made", str(k)]) for k in range(5)])
    assert sorted((tmp_path / "made").read_text().split()) == list("01234")
    assert "error: the third" in capfd.readouterr().err
    run_together(2, [])


# -- progress ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logs(data_bin, tmp_path_factory) -> dict[str, list[str]]:
    """What fairseq's commands, run as stages, leave in their logs."""
    folder = tmp_path_factory.mktemp("run")
    stages, common = Stages(folder), ["--cpu", "--num-workers", 0, "--required-batch-size-multiple", 1]
    training = ["--arch", "transformer", *TINY, "--optimizer", "adam", "--lr", "1e-3", "--max-tokens", 500, *common]
    for form in ("json", "simple"):
        save = ["--save-dir", folder / form, "--max-update", 12, "--log-format", form, "--log-interval", 5]
        stages.run(form, "fairseq-train", data_bin, *PLUGIN, *training, *save)
    of_model = ["--path", folder / "json" / "checkpoint_last.pt", "--max-tokens", 500, *common]
    simple = ["--log-format", "simple", "--log-interval", 2]
    stages.run("record", "ap-record", data_bin, "--subset", "train", "-o", folder / "stats", *of_model, *simple)
    limits = ["--beam", 1, "--max-len-b", 5]
    stages.run("generate", "fairseq-generate", data_bin, *PLUGIN, *of_model, *simple, *limits)
    return {path.stem: path.read_text().splitlines() for path in (folder / "logs").glob("*.log")}


def states(lines, max_update=0) -> list[State]:
    return list(filter(None, (read_state(line, max_update) for line in lines)))


@pytest.mark.parametrize("form", ["json", "simple"])
def test_a_training_shows_updates_and_loss(logs, form):
    found = states(logs[form], 12)
    assert [state[:3] for state in found] == [(5, 12, "updates"), (10, 12, "updates")]
    assert all(3 < float(state.note.removeprefix("loss ")) < 8 for state in found)


@pytest.mark.parametrize("stage", ["record", "generate"])
def test_recording_and_translation_show_batches(logs, stage):
    found = states(logs[stage])
    assert len(found) >= 2 and len({state.total for state in found}) == 1
    assert all(later.done - state.done == 2 for state, later in zip(found, found[1:], strict=False))
    assert 0 < found[-1].done <= found[-1].total and found[0].unit == "batches"


def test_text_is_not_taken_for_progress():
    """A translation may hold what looks like a count; so may what a program says."""
    for line in ("D-3\t-0.4\tstep 3 / 4", "H-1\t-1\tnum_updates=50", "3 / 4", 'x | valid | {"valid_num_updates": "9"}'):
        assert read_state(line) is None
    assert read_state("progress: 2 / 5 steps, text 7.9 s") == State(2, 5, "steps", "text 7.9 s")


def training_line(updates: int) -> str:
    return f'x | INFO | train_inner | {{"loss": "4.5", "nll_loss": "3", "num_updates": "{updates}"}}\n'


def test_a_log_gets_a_line_now_and_then_with_the_seconds_left(tmp_path, monkeypatch):
    """Speed is that since the first report: start-up, and what a resumed training did before, do not count."""
    clock, out, log = [0.0], io.StringIO(), tmp_path / "log"
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    log.write_text("")
    with Progress("dense.train", ["--max-update", "999", "--max-update=1000"], [log], stream=out) as progress:
        for now, text in ((15, ""), (20, training_line(500)), (60, training_line(600)[:20])):
            clock[0] = now
            with log.open("a") as stream:
                stream.write(text)
            progress.update()
        with log.open("a") as stream:
            stream.write(training_line(600)[20:])
        for now in (110, 120, 130, 234, 235):
            clock[0] = now
            progress.update()
    assert out.getvalue().splitlines() == [
        "dense.train: 15 s so far",
        "dense.train: 500 of 1,000 updates, loss 4.5",
        "dense.train: 600 of 1,000 updates, loss 4.5, 400 s left",
    ]


def test_a_terminal_gets_a_bar(tmp_path):
    """It appears at once, counts from the first report on, and is gone at the end."""
    out, log = io.StringIO(), tmp_path / "log"
    out.isatty = lambda: True
    log.write_text("")
    with Progress("dense.train", ["--max-update", "40"], [log], stream=out) as progress:
        progress.update()
        assert "dense.train: 00:00" in out.getvalue()
        with log.open("a") as stream:
            stream.write(training_line(10))
        progress.update()
    assert "25%" in out.getvalue() and "10/40" in out.getvalue() and "loss 4.5" in out.getvalue()
    assert out.getvalue().split("\r")[-2].strip() == ""
