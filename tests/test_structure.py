"""The rooms of the package import downward only."""

import subprocess
import sys
from pathlib import Path

import pytest
import structure

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def graph():
    return structure.module_graph(ROOT)


def test_every_room_is_on_one_floor(graph):
    on_floors = [name for floor in structure.FLOORS for name in floor]
    assert sorted(on_floors) == sorted(structure.room_graph(graph))


def test_no_import_runs_upward_or_between_rooms_of_a_floor(graph):
    """`artifacts.versions` imported the package root, and with it the models and tasks."""
    assert not structure.not_downward(structure.room_graph(graph))


def test_no_modules_import_each_other_in_a_circle(graph):
    """The report's writer and its page imported each other."""
    assert not structure.circles(graph)
    assert not structure.circles(structure.room_graph(graph))


def test_the_count_finds_upward_imports_and_circles_wherever_they_stand(tmp_path):
    files = {
        "triton_ops/__init__.py": "",
        "triton_ops/api.py": "def attend():\n    from . import layout\n",
        "triton_ops/layout.py": "from .api import attend\n",
        "ap_fairseq/__init__.py": "",
        "ap_fairseq/files.py": "if TYPE_CHECKING:\n    from ap_fairseq.report import page\n",
        "ap_fairseq/report/__init__.py": "",
        "ap_fairseq/report/page.py": "import os\nimport ap_fairseq.files\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = structure.module_graph(tmp_path)
    rooms = structure.room_graph(graph)
    assert structure.circles(graph) == [
        ["ap_fairseq.files", "ap_fairseq.report.page"],
        ["triton_ops.api", "triton_ops.layout"],
    ]
    assert structure.circles(rooms) == [["files", "report"]]
    assert structure.not_downward(rooms) == [("files", "report")]


def test_masks_are_made_without_torch_and_fairseq():
    """ap-masks needs numpy alone, but patched fairseq on import."""
    names = "('torch', 'triton', 'fairseq')"
    code = f"import sys, ap_fairseq.cli.masks; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
