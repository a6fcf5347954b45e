"""Stages of the examples run once, resume after a failure, and do not mix settings (scripts/stages.sh)."""

import subprocess
from pathlib import Path

STAGES = Path(__file__).resolve().parents[2] / "scripts" / "stages.sh"


def bash(folder, script: str) -> subprocess.CompletedProcess:
    text = f'set -euo pipefail; source "{STAGES}"; run="{folder}"; {script}'
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=60)


def test_a_finished_stage_is_skipped(tmp_path):
    script = f"stage one bash -c 'echo x >> {tmp_path}/count; echo printed'"
    assert "running" in bash(tmp_path, script).stdout
    assert "done before" in bash(tmp_path, script).stdout
    assert (tmp_path / "count").read_text() == "x\n"
    assert (tmp_path / "logs" / "one.log").read_text() == "printed\n"
    assert float((tmp_path / "stages" / "one").read_text().split("\n")[0]) >= 0


def test_a_failed_stage_stops_the_run_and_is_repeated(tmp_path):
    script = f"stage one bash -c 'echo trouble; test -e {tmp_path}/ready'; echo after"
    failed = bash(tmp_path, script)
    assert failed.returncode == 1 and "after" not in failed.stdout
    assert "trouble" in failed.stderr and "stage one failed" in failed.stderr
    (tmp_path / "ready").touch()
    assert "after" in bash(tmp_path, script).stdout


def test_a_stage_with_other_settings_is_refused(tmp_path):
    bash(tmp_path, "stage one echo --lr 1")
    refused = bash(tmp_path, "stage one echo --lr 2")
    assert refused.returncode == 1
    assert "then: echo --lr 1" in refused.stderr and "now:  echo --lr 2" in refused.stderr


def test_a_stage_runs_once_for_scripts_that_want_it_at_the_same_time(tmp_path):
    script = f"stage one bash -c 'sleep 1; echo x >> {tmp_path}/count'"
    both = bash(tmp_path, f"({script}) & first=$!; ({script}) & wait $first; wait $!")
    assert both.returncode == 0 and "done before" in both.stdout
    assert (tmp_path / "count").read_text() == "x\n"
