"""The READMEs' tables and numbers are those of the committed results; their links and flags exist."""

import argparse
import contextlib
import functools
import importlib
import io
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import readme_tables
import result_tables
from fairseq import options
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY
from plugin.commands import ROOT, TINY

READMES = readme_tables.readmes()


def each_readme(function):
    return pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))(function)


def prose(text):
    """*text* without what is generated or code."""
    text = readme_tables.SPAN.sub("", readme_tables.TABLE.sub("", text))
    text = re.sub(r"(?m)^( {4}|\|).*$", "", text)
    return re.sub(r"`[^`]*`", "", text)


@each_readme
def test_tables_and_numbers_are_those_of_the_committed_results(path):
    text = path.read_text(encoding="utf-8")
    assert readme_tables.regenerate(text) == text, "run scripts/readme_tables.py --write"
    assert text.count("<!-- results:") == len(readme_tables.TABLE.findall(text))
    assert text.count("<!-- n:") == len(readme_tables.SPAN.findall(text))


def test_each_table_is_shown_once():
    shown = [name for path in READMES for _, name, *_ in readme_tables.TABLE.findall(path.read_text(encoding="utf-8"))]
    assert sorted(shown) == sorted(result_tables.tables())


def test_stale_tables_and_numbers_are_rewritten():
    span = '<!-- n: scripts/rivals.json "translation/rows/case=sentences/stock" ,.0f -->'
    table = "<!-- results: rivals.translation -->\n"
    first = f"{span}1<!-- /n -->\n{table}old\n<!-- end -->\n{table}<!-- end -->\n"
    made = f"{table}{result_tables.rivals_translation()}\n<!-- end -->\n"
    assert readme_tables.regenerate(first) == f"{span}11,717<!-- /n -->\n{made}{made}"
    with pytest.raises(KeyError, match="nothing matches"):
        readme_tables.number('scripts/rivals.json "translation/rows/case=none/stock" .1f')


def test_several_numbers_are_averaged_only_where_a_mark_says_so():
    """Two measurements of cuDNN were averaged into a prose number that the table above it contradicted."""
    rows = {"rows": [{"system": "dense", "seed": 1, "bleu": 1.0}, {"system": "dense", "seed": 2, "bleu": 2.0}]}
    assert result_tables.lookup(rows, "rows/system=dense&seed=2/bleu") == 2.0
    with pytest.raises(KeyError, match="2 numbers match rows/system=dense/bleu; add conditions"):
        result_tables.lookup(rows, "rows/system=dense/bleu")
    assert result_tables.lookup(rows, "mean:rows/system=dense/bleu") == 1.5
    assert result_tables.lookup(rows, "first:rows/system=dense/bleu") == 1.0


def test_parts_of_a_test_set_and_their_mean(tmp_path):
    """Systems in columns, the dense one first; seeds and other scores are in the table of the sweep."""
    common = {"schedule": "scratch", "granularity": 1, "options": "", "kinds": "global"}
    systems = [("mean", "mean.global.80.g1.scratch", (30, 11)), ("dense", "dense.scratch", (31.004, 12.5))]
    lines = [
        {**common, "criterion": criterion, "group": group,
         "parts": {"de": {"sentences": 1234, "bleu": de}, "fr": {"sentences": 5, "bleu": fr}}}
        for criterion, group, (de, fr) in systems
    ]  # fmt: skip
    (tmp_path / "results.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    table = result_tables.sweep_parts(tmp_path / "results.jsonl").splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in (table[0], *table[2:])] == [
        ["BLEU", "test pairs", "dense, from scratch", "mean 80%, from scratch"],
        ["de", "1,234", "31.00", "30.00"],
        ["fr", "5", "12.50", "11.00"],
        ["mean", "", "21.75", "20.50"],
    ]


@pytest.mark.parametrize("name", ["debian-tuned", "h100-converged-digest", "h100-pages-digest"])
def test_tables_of_sweeps_state_both_metrics(name):
    """The digests of older sweeps named BLEU alone, and the updates after those of the dense model."""
    table = result_tables.tables()[name]().splitlines()[0]
    wanted = {"total updates", "BLEU", "chrF2", "BLEU without brevity penalty", "validation perplexity"}
    assert wanted <= {cell.strip() for cell in table.split("|")}


def test_what_older_sweeps_do_not_state():
    line = {"criterion": "importance", "schedule": "one-shot", "start": 0.0, "updates": 1500}
    line |= {"bleu": 30.0, "length_ratio": 0.95}
    completed = result_tables.completed(line, 6000)
    assert completed["total_updates"] == 7500
    assert completed["bleu_unpenalized"] == pytest.approx(30 * math.exp(1 / 0.95 - 1))
    assert result_tables.completed(line | {"schedule": "gradual", "start": 0.8}, 6000)["total_updates"] == 13500
    dense = line | {"criterion": "dense", "schedule": "scratch", "updates": 12000, "length_ratio": 1.1}
    assert result_tables.completed(dense, 6000)["total_updates"] == 12000
    assert result_tables.completed(dense, 6000)["bleu_unpenalized"] == 30
    stated = result_tables.load(result_tables.DEBIAN_RESULTS / "tuned.jsonl")[0]
    assert result_tables.completed(stated, 6000) == stated
    without = {key: value for key, value in stated.items() if key != "bleu_unpenalized"}
    assert result_tables.completed(without, 0)["bleu_unpenalized"] == pytest.approx(stated["bleu_unpenalized"])


@each_readme
def test_measured_numbers_in_prose_are_generated(path):
    """A number that was typed by hand stays when the results change."""
    unit = r"(?:BLEU|chrF2?|points|times|tokens/s|sentences/s|ms|TB/s|TFLOP/s|[GM]iB)\b"
    found = re.findall(rf"[^\n]*\b\d[\d.,]*\s+{unit}[^\n]*", prose(path.read_text(encoding="utf-8")))
    assert not found


@pytest.mark.parametrize("path", [*READMES, *sorted((ROOT / ".github").glob("*.md"))], ids=lambda path: path.name)
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


@each_readme
def test_modules_of_a_folder_are_described(path):
    """A folder map that misses a module misleads: recording/README.md once named a file that was gone."""
    text = path.read_text(encoding="utf-8")
    listed = re.findall(r"(?m)^\| (`.*?`) \|", text)
    files = {name for cell in listed for name in re.findall(r"`(?:\./)?([\w./]+\.(?:py|sh))`", cell)}
    assert [name for name in files if not any((folder / name).exists() for folder in (path.parent, ROOT))] == []
    if ROOT / "ap_fairseq" in path.parents or path.parent.name == "triton_ops":
        modules = {module.name for module in path.parent.glob("*.py")} - {"__init__.py"}
        assert modules <= files or path.parent.name in ("cli", "training")  # commands, and a sentence


def test_the_readme_is_one_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 170
    assert len(re.sub(r"<!--.*?-->", "", text)) <= 11_500


# -- commands ---------------------------------------------------------------------------------------------------------

SOURCES = [  # not those in the data of the examples
    path for folder in ("scripts", "examples", "ap_fairseq") for name in ("*.py", "*/*.py")
    for path in (ROOT / folder).glob(name)
]  # fmt: skip
OTHERS = {"pip", "python3", "apt-get", "compute-sanitizer", "torchrun", "srun"}  # not of fairseq or of this package
PROGRAMS = [
    path for path in (ROOT / "ap_fairseq/cli").glob("*.py") if "\ndef main(" in path.read_text(encoding="utf-8")
]
COMMANDS = sorted(f"ap-{path.stem.replace('_', '-')}" for path in PROGRAMS)


def commands(text):
    """The commands of the indented blocks, split into words; continued lines are joined."""
    for block in re.findall(r"(?m)(?:^ {4,}.*\n)+", text):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            with contextlib.suppress(ValueError):  # BibTeX and listings: not every quote is closed
                words = shlex.split(line, comments=True)
                while words and "=" in words[0]:  # settings of the environment
                    words.pop(0)
                if words:
                    yield words


def flags_of(words):
    """The flags among *words*, with those that a word quotes (--record '--fp16 --max-tokens 16384')."""
    split = itertools.chain.from_iterable(word.split() if word.startswith("-") else [word] for word in words)
    return {word.split("=")[0] for word in split if re.match(r"--?[a-zA-Z]", word)}


@functools.cache
def own_flags(command):
    """The flags in the help of one of this package's commands."""
    main = importlib.import_module(f"ap_fairseq.cli.{command.removeprefix('ap-').replace('-', '_')}").main
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setattr("sys.argv", [command, "--help"])
        with pytest.raises(SystemExit):
            main()
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", shown.getvalue()))


@functools.cache
def source_flags(path):
    """The flags that a script defines, by its source."""
    text = path.read_text(encoding="utf-8")
    shared = {"--out", "--table"} if "add_result_options(" in text else set()
    return {"-h", "--help"} | shared | set(re.findall(r"[\"'](--?[a-zA-Z][\w-]*)[\"']", text))


@functools.cache
def fairseq_flags():
    """Every flag of fairseq's commands, with those of all its components and ours."""
    parsers = [
        options.get_training_parser(),
        options.get_interactive_generation_parser(),
        options.get_validation_parser(),
        options.get_preprocessing_parser(),
        options.get_eval_lm_parser(),
    ]
    components = [ARCH_MODEL_REGISTRY["pruned_transformer"], *TASK_REGISTRY.values()]
    components += [component for registry in REGISTRIES.values() for component in registry["registry"].values()]
    for component in components:
        parsers.append(argparse.ArgumentParser(conflict_handler="resolve", allow_abbrev=False))
        if hasattr(component, "add_args"):
            component.add_args(parsers[-1])
        elif getattr(component, "__dataclass", None):
            gen_parser_from_dataclass(parsers[-1], getattr(component, "__dataclass")())
    return set().union(*(parser._option_string_actions for parser in parsers))


def allowed_flags(program, words):
    """The flags that a command may have; None for programs of others."""
    if program.startswith("fairseq-"):
        return fairseq_flags()
    if program.startswith("ap-"):
        passed_on = fairseq_flags() if program in ("ap-record", "ap-prune-schedule", "ap-generate") else set()
        quoted = own_flags("ap-masks") | own_flags("ap-record") if program == "ap-prune-schedule" else set()
        subcommands = source_flags(ROOT / "ap_fairseq/cli/report.py") if program == "ap-report" else set()
        return own_flags(program) | passed_on | quoted | subcommands
    named = [word for word in words if word.endswith((".py", ".sh"))]
    paths = [ROOT / word if "/" in word else next(ROOT.glob(f"examples/*/{word}"), ROOT / word) for word in named]
    if paths and program not in OTHERS:
        for path in paths:
            assert path.exists(), f"{path} of {' '.join(words)}"
        recipes = ROOT.glob("examples/*/*.py") if paths[0].suffix == ".sh" else []
        return set().union(*map(source_flags, [*(path for path in paths if path.suffix == ".py"), *recipes]))
    return None


@each_readme
def test_flags_of_commands_exist(path):
    for words in commands(path.read_text(encoding="utf-8")):
        if words[0] in ("torchrun", "srun"):  # the command that they start
            words = list(itertools.dropwhile(lambda word: not word.startswith(("fairseq-", "ap-")), words))
        allowed = allowed_flags(words[0], words)
        if allowed is not None:
            assert flags_of(words[1:]) <= allowed, " ".join(words)


def test_commands_are_found():
    """Of the main README at least: a changed layout must not empty the test above."""
    words = list(commands((ROOT / "README.md").read_text(encoding="utf-8")))
    programs = {command[0] for command in words}
    assert programs >= {"ap-record", "ap-masks", "fairseq-train", "fairseq-generate", "ap-evaluate", "bash"}
    train = next(command for command in words if command[0] == "fairseq-train")
    assert {"--user-dir", "--attention-masks", "--save-dir"} <= flags_of(train)
    assert "--no-such-flag" not in fairseq_flags() | own_flags("ap-masks")


@each_readme
def test_flags_in_prose_exist(path):
    known = fairseq_flags().union(*map(source_flags, SOURCES))
    known |= {flag for command in COMMANDS for flag in own_flags(command)}
    text = re.sub(r"(?m)^ {4}.*$", "", readme_tables.TABLE.sub("", path.read_text(encoding="utf-8")))
    quoted = re.findall(r"`([^`]*)`", text)
    assert flags_of(itertools.chain.from_iterable(part.split() for part in quoted if "pip" not in part)) <= known


def block(title):
    """The code block of a section of the main README."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    return textwrap.dedent("".join(re.findall(r"(?m)^ {4}.*\n", section)))


def test_the_pipeline_and_the_masks_of_the_readme_run(data_bin, dense, toy_text, tmp_path):
    """The commands as they stand, on a toy corpus; "..." stands for the usual flags of a training."""
    sizes = [*TINY, "--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "64"]
    flags = "--optimizer adam --lr 3e-3 --max-tokens 2000 --max-update 5 --cpu --num-workers 0".split()
    pipeline = block("The pipeline in five commands")
    assert pipeline.count(" ...") == 1
    pipeline = pipeline.replace(" ...", " " + shlex.join([*sizes, *flags]))
    (tmp_path / "data-bin").mkdir()
    (tmp_path / "data-bin/sentences").symlink_to(data_bin)
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense/checkpoint_best.pt").symlink_to(dense)
    (tmp_path / "test.de").symlink_to(toy_text / "test.de")
    masks = block("Which masks should I use?").replace(" masks.safetensors", " other.safetensors --overwrite")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    for commands_of_block in (pipeline, masks):
        bash = ["bash", "-euo", "pipefail", "-c", commands_of_block]
        done = subprocess.run(bash, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (system,) = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["systems"]
    assert system["system"] == "pruned" and "bleu_signature" in system
    shares = [system["sparsity"][kind]["effective"] for kind in ("encoder_self", "decoder_self", "cross")]
    assert max(shares) > 0.8 > min(shares), "one budget for all kinds"
    assert (tmp_path / "other.safetensors").exists()
