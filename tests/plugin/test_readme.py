"""The READMEs' tables and numbers are those of the committed results; their links and flags exist."""

import argparse
import contextlib
import importlib
import io
import re
import shlex

import pytest
from fairseq import options
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY
from plugin.commands import ROOT, load_script

readme_tables = load_script(ROOT / "scripts/readme_tables.py")
READMES = readme_tables.readmes()


def of_readmes(function):
    return pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))(function)


def prose(text):
    """*text* without what is generated or code."""
    text = readme_tables.SPAN.sub("", readme_tables.TABLE.sub("", text))
    text = re.sub(r"(?m)^( {4}|\|).*$", "", text)
    return re.sub(r"`[^`]*`", "", text)


def commands(text):
    """The command lines of the indented blocks, continued lines joined, split into words."""
    blocks = re.sub(r"\\\n\s*", " ", text)
    for line in re.findall(r"(?m)^ {4,}(\S.*)$", blocks):
        with contextlib.suppress(ValueError):  # a BibTeX entry or a listing, where quotes need not be closed
            yield shlex.split(line, comments=True)


@of_readmes
def test_tables_and_numbers_are_those_of_the_committed_results(path):
    text = path.read_text(encoding="utf-8")
    assert readme_tables.regenerate(text) == text, "run scripts/readme_tables.py --write"
    assert text.count("<!-- results:") == len(readme_tables.TABLE.findall(text))
    assert text.count("<!-- n:") == len(readme_tables.SPAN.findall(text))


def test_each_table_is_shown_once():
    shown = [name for path in READMES for _, name, *_ in readme_tables.TABLE.findall(path.read_text(encoding="utf-8"))]
    assert sorted(shown) == sorted(readme_tables.tables())


def test_stale_tables_and_numbers_are_rewritten():
    span = '<!-- n: scripts/rivals.json "translation/rows/case=sentences/stock" ,.0f -->'
    table = "<!-- results: rivals.cpu -->\n"
    first = f"{span}1<!-- /n -->\n{table}old\n<!-- end -->\n{table}<!-- end -->\n"
    made = f"{table}{readme_tables.rivals_cpu()}\n<!-- end -->\n"
    assert readme_tables.regenerate(first) == f"{span}11,717<!-- /n -->\n{made}{made}"
    with pytest.raises(KeyError, match="nothing matches"):
        readme_tables.number('scripts/rivals.json "translation/rows/case=none/stock" .1f')


@of_readmes
def test_measured_numbers_in_prose_are_generated(path):
    """A number that was typed by hand stays when the results change."""
    unit = r"(BLEU|chrF2?|points|times|tokens/s|sentences/s|pairs a second|GPU hours|ms\b|TB/s|TFLOP/s|MB\b|GB\b|[GM]iB)"
    found = re.findall(rf"[^\n]*\b\d[\d.,]*\s+{unit}[^\n]*", prose(path.read_text(encoding="utf-8")))
    assert not found


@of_readmes
def test_links_exist(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"(?m)^#+ (.*)$", linked.read_text(encoding="utf-8"))
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, target


def test_the_readme_is_one_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 170
    assert len(re.sub(r"<!--.*?-->", "", text)) <= 11_500


# -- flags ------------------------------------------------------------------------------------------------------------


def help_of(command):
    """The help of one of this package's commands."""
    main = importlib.import_module(f"ap_fairseq.cli.{command.removeprefix('ap-').replace('-', '_')}").main
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        patch.setattr("sys.argv", [command, "--help"])
        main()
    return shown.getvalue()


def flags_of(text):
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", text))


def fairseq_flags():
    """Every flag of fairseq's commands, with those of all its components."""
    flags = set()
    for parser in (
        options.get_training_parser(),
        options.get_generation_parser(interactive=True),
        options.get_validation_parser(),
        options.get_preprocessing_parser(),
    ):
        flags |= set(parser._option_string_actions)
    components = [ARCH_MODEL_REGISTRY["pruned_transformer"], *TASK_REGISTRY.values()]
    components += [component for registry in REGISTRIES.values() for component in registry["registry"].values()]
    for component in components:
        parser = argparse.ArgumentParser(conflict_handler="resolve", allow_abbrev=False)
        if hasattr(component, "add_args"):
            component.add_args(parser)
        elif getattr(component, "__dataclass", None):
            gen_parser_from_dataclass(parser, getattr(component, "__dataclass")())
        flags |= set(parser._option_string_actions)
    return flags
