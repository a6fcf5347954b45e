"""The package works from a wheel, in an environment and a folder that know nothing of the clone."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from plugin.commands import TINY

ROOT = Path(__file__).resolve().parent.parent


class Installed:
    """An environment with the wheel alone; what it depends on is lent by the environment of the tests."""

    def __init__(self, folder: Path):
        source = folder / "source"  # setuptools builds inside the source and would take along what an older build left
        for name in ("ap_fairseq", "triton_ops"):
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        pip = [sys.executable, "-m", "pip"]
        offline = ["--quiet", "--no-deps", "--no-index"]
        self._run(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
        (wheel,) = folder.glob("ap_fairseq-*.whl")

        venv.create(folder / "env", with_pip=False)
        self.bin = folder / "env" / "bin"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        self._run(*pip, "--python", self.bin / "python", "install", *offline, wheel, cwd=folder)
        (self.site,) = (folder / "env" / "lib").glob("python*/site-packages")
        # A folder named in a .pth file is searched, but its own .pth files, with the editable install, are not read.
        (self.site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def _run(self, *command, cwd: Path) -> str:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(map(str, command), cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def run(self, command: str, *arguments) -> str:
        """Run a command of the environment outside the clone and return what it prints."""
        return self._run(self.bin / command, *arguments, cwd=self.elsewhere)

    def user_dir(self) -> str:
        return self.run("python", "-m", "ap_fairseq").strip()


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    return Installed(tmp_path_factory.mktemp("wheel"))


def test_the_folder_for_user_dir_is_the_installed_one(installed):
    """`--user-dir ap_fairseq` worked in the root of a clone only."""
    assert Path(installed.user_dir()) == (installed.site / "ap_fairseq").resolve()


COMMANDS = "ap-record ap-masks ap-prune-schedule ap-apply ap-average ap-generate ap-evaluate ap-report".split()
HELP = """
import contextlib, importlib.metadata, sys
for entry_point in importlib.metadata.distribution("ap-fairseq").entry_points:
    sys.argv = [entry_point.name, "--help"]
    with contextlib.suppress(SystemExit):
        entry_point.load()()
"""


def test_every_command_has_help(installed):
    """All but one in a single process, as most of them import fairseq."""
    assert {path.name for path in installed.bin.glob("ap-*")} == set(COMMANDS)
    assert installed.run("ap-masks", "--help").startswith("usage: ap-masks ")
    shown = [line.split()[1] for line in installed.run("python", "-c", HELP).splitlines() if line.startswith("usage: ")]
    assert sorted(shown) == sorted(COMMANDS)


def test_fairseq_preprocesses_and_trains_with_the_user_dir(installed):
    for side in ("en", "de"):
        (installed.elsewhere / f"train.{side}").write_text("a b c\nb c\n" * 8)
    common = ["--user-dir", installed.user_dir(), "-s", "en", "-t", "de"]
    data = ["--trainpref", "train", "--joined-dictionary", "--destdir", "data-bin"]
    installed.run("python", "-m", "fairseq_cli.preprocess", *common, *data)
    model = [*TINY, "--arch", "pruned_transformer", "--attention-masks", "none", "--optimizer", "adam"]
    limits = ["--max-tokens", 100, "--max-update", 1, "--disable-validation", "--no-epoch-checkpoints", "--cpu"]
    installed.run("python", "-m", "fairseq_cli.train", "data-bin", *common, *model, *limits, "--save-dir", "model")
    assert (installed.elsewhere / "model" / "checkpoint_last.pt").is_file()


def test_masks_and_the_report_page_are_made_from_the_wheel(installed):
    """The templates of the page are data files, which a wheel holds only if setup.py lists them."""
    stats = ROOT / "tests" / "plugin" / "quickstart_stats.safetensors"
    installed.run("ap-masks", stats, "--total", 0.5, "-o", "masks.safetensors")
    installed.run("ap-report", "--stats", stats, "--masks", "masks.safetensors", "-o", "report")
    assert "<html" in (installed.elsewhere / "report" / "report.html").read_text(encoding="utf-8")
