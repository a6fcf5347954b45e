"""The README's figures are the committed ones."""

import importlib.util
import json
import sys

import pytest
from plugin.commands import ROOT

from ap_fairseq.evaluation.results import format_markdown

EXAMPLE = ROOT / "examples" / "libreoffice_help"


def script(path):
    sys.path.insert(0, str(path.parent))  # scripts import each other
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def lines(name):
    return [json.loads(line) for line in (EXAMPLE / f"results/{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def tables():
    """Name of a table in the README -> text that its results give."""
    yield "cpu", lambda: format_markdown(json.loads((EXAMPLE / "results/cpu.json").read_text(encoding="utf-8")))
    for name in "h100-converged h100-pages h100-scratch h100-pool cpu-short cpu-scratch cpu-sweep".split():
        yield name, lambda name=name: script(EXAMPLE / "sweep.py").format_table(lines(name))
    samples = json.loads((ROOT / "scripts/sample_error.cpu.json").read_text(encoding="utf-8"))
    yield "sample", lambda: script(ROOT / "scripts/sample_error.py").format_markdown(samples)
    for path in sorted((ROOT / "scripts").glob("*_*.*.json")):
        name, report = path.name.split(".")[0], json.loads(path.read_text(encoding="utf-8"))
        if name != "sample_error":
            yield path.stem, lambda name=name, report=report: script(ROOT / f"scripts/{name}.py").table(report)


@pytest.mark.parametrize(("name", "make"), tables(), ids=lambda value: value if isinstance(value, str) else "")
def test_result_tables_are_generated_from_the_committed_results(name, make):
    readmes = [path for path in ROOT.rglob("README.md") if not set(path.parts) & {".venv", ".pytest_cache"}]
    texts = [path.read_text(encoding="utf-8") for path in readmes]
    (readme,) = (text for text in texts if f"<!-- results: {name} -->" in text)
    table = readme.split(f"<!-- results: {name} -->\n")[1].split("\n<!-- end -->")[0]
    assert table == make()
