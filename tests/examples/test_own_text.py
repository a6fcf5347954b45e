"""Nothing that others wrote is committed: a tracked file is code, documentation, or data that a program here made."""

import ast
import json
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CODE = ("*.py", "*.sh", "*.md", "*.toml", "*.yaml", "*.yml", "*.css", "*.js", "*.j2")
CODE += ("LICENSE", "MANIFEST.in", "*.cfg", "*.cff", ".gitignore", ".gitattributes", ".ci/run", "py.typed")
DATA = {  # pattern -> what made it, or reads what was typed in
    "scripts/bench_attention.*.json": "scripts/bench_attention.py",
    "scripts/bench_commands.*.json": "scripts/bench_commands.py",
    "scripts/bench_fairseq.*.json": "scripts/bench_fairseq.py",
    "scripts/bench_ranks.*.json": "scripts/bench_ranks.py",
    "scripts/bench_steps.*.json": "scripts/bench_steps.py",
    "scripts/sample_error.*.json": "scripts/sample_error.py",
    "scripts/tune_attention.*.json": "scripts/tune_attention.py",
    "examples/libreoffice_help/results/*.json": "ap_fairseq/cli/evaluate.py",
    "examples/*/results/*.jsonl": "examples/common/sweep.py",
    "examples/*/results/corpus.json": "scripts/result_tables.py",
    "examples/*/results/losses.json": "scripts/result_tables.py",
    "examples/*/results/resampled-pages.json": "examples/common/resample_pages.py",
    "scripts/rivals.json": "scripts/result_tables.py",
    "examples/language_model/results/*.json": "examples/language_model/run.py",
    "examples/package_sections/results/*.json": "examples/package_sections/run.py",
    "scripts/kernels.*.json": "scripts/result_tables.py",
    "tests/plugin/scored_run.json": "ap_fairseq/cli/evaluate.py",
    "tests/plugin/quickstart_stats.safetensors": "ap_fairseq/recording/recorder.py",
}
LONGEST_STRING = 1000  # of a results file: a command line, a note
LONGEST_TEXT = 1500  # of a literal in code that is not a docstring: HTML of a test page, a script


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]


def unexplained(names) -> list[str]:
    """Files of no known kind; ``*`` matches slashes, too, but for data only below their folder."""
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in (*CODE, *DATA))]


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def long_literals(source: str) -> list[str]:
    """String literals of a program that are long and no docstrings."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        node.body[0].value for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)
    }
    literals = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [node.value for node in literals if node not in docstrings and len(node.value) > LONGEST_TEXT]


def test_every_tracked_file_is_of_a_known_kind(tracked):
    """429 segments of LibreOffice's help (Mozilla Public License) were once a fixture in this MIT repository."""
    assert unexplained(["tests/examples/sentences.tsv", "data/train.de", "notes.txt"]) == [
        "tests/examples/sentences.tsv",
        "data/train.de",
        "notes.txt",
    ]
    assert unexplained(tracked) == []
    assert [maker for maker in DATA.values() if maker not in tracked] == []


def test_results_hold_numbers_and_no_text(tracked):
    files = [name for name in tracked if name.endswith((".json", ".jsonl"))]
    assert files
    for name in files:
        text = (ROOT / name).read_text("utf-8")
        documents = text.splitlines() if name.endswith("l") else [text]
        longest = max((word for document in documents for word in strings(json.loads(document))), key=len)
        assert len(longest) <= LONGEST_STRING, (name, longest[:200])


def test_programs_hold_no_long_texts(tracked):
    assert long_literals(f"x = '{'word ' * 400}'") and not long_literals(f"'''{'word ' * 400}'''")
    found = {name: long_literals((ROOT / name).read_text("utf-8")) for name in tracked if name.endswith(".py")}
    assert {name: [text[:80] for text in texts] for name, texts in found.items() if texts} == {}
