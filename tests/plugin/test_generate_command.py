"""ap-generate: several processes print what fairseq-generate prints; a text that was cut goes on where it stopped."""

import argparse
import functools
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import sentencepiece
import torch
from fairseq import checkpoint_utils, options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.scoring.bleu import SacrebleuConfig, SacrebleuScorer
from plugin.commands import PLUGIN, ROOT, run, train, wait_for

from ap_fairseq import processes
from ap_fairseq.cli import generate
from ap_fairseq.generation import binarised, ranks, scoring
from ap_fairseq.generation import text as generation_text
from ap_fairseq.generation.joining import append_sentences, join
from ap_fairseq.generation.lines import BatchLines
from ap_fairseq.generation.loading import load_faster
from ap_fairseq.generation.scoring import SacrebleuSums
from ap_fairseq.generation.text import Text, default_part_lines
from ap_fairseq.generation.translator import Found, Translator
from ap_fairseq.model.checkpoints import load_checkpoint

AP_GENERATE = [sys.executable, "-m", "ap_fairseq.cli.generate"]
TWO = ["--cpu", "--num-processes", "2", "--num-workers", "0"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def ap_generate(*flags, expect: int = 0) -> str:
    return run("ap-generate", *TWO, *flags, expect=expect)


def ap_generate_process(*flags, text: str | None = None) -> subprocess.CompletedProcess:
    """In a process of its own, with standard output apart from the log."""
    command = [*AP_GENERATE, *TWO, *map(str, flags)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def start(*flags, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [*AP_GENERATE, *TWO, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it in what it starts with &
    )


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def sentence_lines(log: str) -> list[str]:
    """The lines about sentences in fairseq-generate's output, in the order of the data set."""
    lines = [line for line in log.split("\n") if re.match(r"[STHDPA]-\d+\t", line)]
    return sorted(lines, key=lambda line: int(line.split("\t")[0][2:]))


@pytest.mark.parametrize("scoring", ["bleu", "sacrebleu"])
def test_two_processes_print_what_fairseq_generate_prints(data_bin, dense, tmp_path, scoring):
    """The same lines in order, and the score of all sentences. 60 sentences by 16 make four batches."""
    flags = ["--path", dense, "--gen-subset", "valid", "--beam", 3, "--nbest", 2, "--batch-size", 16]
    flags += ["--scoring", scoring]
    stock = run("fairseq-generate", data_bin, *PLUGIN, *flags, "--cpu", "--required-batch-size-multiple", 1)
    said = ap_generate(data_bin, *flags, "--results-path", tmp_path)
    assert said.count("fairseq's own generator is used: a model Transformer") == 1  # by two processes
    lines = (tmp_path / "generate-valid.txt").read_text("utf-8").splitlines()
    if scoring == "sacrebleu":
        signature = lines.pop()
        assert re.match(r"sacreBLEU signature: nrefs:1\|case:mixed\|eff:no\|tok:13a\|smooth:exp\|version:", signature)
    *ours, score = lines
    assert ours == sentence_lines(stock) and len(ours) == 60 * (2 + 2 * 3)
    assert score in stock.splitlines() and score.startswith("Generate valid with beam=3: BLEU")
    assert [path.name for path in tmp_path.iterdir()] == ["generate-valid.txt"]


@pytest.mark.parametrize("flags", [["bleu"], ["sacrebleu"], ["chrf"], ["sacrebleu", "--print-alignment"]], ids=" ".join)
def test_a_process_counts_for_the_score(data_bin, dense, tmp_path, flags):
    """sacreBLEU counted all sentences when they had been searched: longer than the search of 700,000 had taken."""
    common = [data_bin, "--task", "pruned_translation", "--path", dense, "--gen-subset", "valid", "--num-workers", 0]
    common += ["--batch-size", 16, "--required-batch-size-multiple", 1, "--max-len-b", 9, "--cpu", "--scoring", *flags]
    parser = options.get_generation_parser()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, list(map(str, common))))
    with ranks.Ranks([tmp_path / f"rank{rank}.log" for rank in range(2)], cpu=True) as two:
        joined = binarised.translate_subset(cfg, two, tmp_path)
    shares = [(tmp_path / f"rank{rank}" / "generate-valid.txt").read_text("utf-8") for rank in range(2)]
    by_fairseq, is_bleu = "--print-alignment" in flags, flags[0] != "chrf"
    assert [share.count("scored with the other processes") for share in shares] == [not by_fairseq] * 2
    sums = [json.loads((tmp_path / f"rank{rank}.json").read_text("utf-8"))["sums"] for rank in range(2)]
    assert [numbers is not None and sum(numbers) > 0 for numbers in sums] == [is_bleu] * 2
    assert len(joined.sentences) == 60 and ("BLEU" if is_bleu else "chrF2") in joined.score[0]


@pytest.mark.parametrize("n", [1, 3, 9])
def test_sums_of_several_scorers_are_those_of_one(n, monkeypatch):
    """Of texts that are counted two at a time; of one text the second scorer has none."""
    monkeypatch.setattr(scoring, "_TOGETHER", 2)
    stock, whole, *shares = (SacrebleuScorer(SacrebleuConfig()), *(SacrebleuSums(SacrebleuConfig()) for _ in range(3)))
    for number in range(n):
        pair = f"Page {number}, the last, opens.", f"Page {number}, the last one, opens."
        for scorer in (stock, shares[number % 2]):
            scorer.add_string(*pair)
    whole.sums = [sum(numbers) for numbers in zip(*(share.sums for share in shares), strict=True)]
    assert whole.result_string() == stock.result_string() and not any(share.ref for share in shares)


def test_a_scorer_of_a_user_counts_for_itself():
    """One derived from fairseq's was taken for that, whatever it changed: the score was sacreBLEU's under its name."""

    class Scorer(SacrebleuScorer):
        def result_string(self, order=4):
            return "mine"

    assert scoring.summing(Scorer(SacrebleuConfig())) is None
    assert isinstance(scoring.summing(SacrebleuScorer(SacrebleuConfig())), SacrebleuSums)


def test_lines_are_joined_in_the_order_of_their_sentences(tmp_path):
    """Lines may hold anything, such as what looks like the next sentence; a process may have written none."""
    paths = [tmp_path / name for name in ("lines0.txt", "lines1.txt")]
    append_sentences(paths[0], [3, 0], ["S-3\tä\n".encode(), b"S-0\tS-1\n"])
    append_sentences(paths[0], [], [])
    append_sentences(paths[0], [10], [b"S-10\t\nT-10\t\n"])
    append_sentences(paths[1], [2, 1], [b"S-2\t\nS-3\t\n", b"S-1\t\n"])
    expected = [b"S-0\tS-1\n", b"S-1\t\n", b"S-2\t\nS-3\t\n", "S-3\tä\n".encode(), b"S-10\t\nT-10\t\n"]
    assert join(paths) == join(paths[::-1]) == expected and join([]) == []


@pytest.fixture(scope="module")
def unknown_bin(data_bin, toy_text, tmp_path_factory):
    """Subsets with words that the dictionaries lack: ``valid``, and ``test`` without references."""
    folder = tmp_path_factory.mktemp("unknown")
    for language in ("en", "de"):
        text = (toy_text / f"valid.{language}").read_text("utf-8")
        (folder / f"valid.{language}").write_text(re.sub(r"\b(und|and)\b", "&", text), "utf-8")
    common = ["fairseq-preprocess", "-s", "en", "-t", "de", "--srcdict", data_bin / "dict.en.txt"]
    target, valid = ["--tgtdict", data_bin / "dict.de.txt"], folder / "valid"
    run(*common, *target, "--validpref", valid, "--destdir", folder / "data-bin")
    run(*common, "--only-source", "--testpref", valid, "--destdir", folder / "source-bin")
    for file in (folder / "source-bin").glob("test.*"):
        shutil.copy(file, folder / "data-bin")
    model = dict(model_prefix=folder / "data-bin/spm", vocab_size=35, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(input=toy_text / "train.en", **model)
    return folder / "data-bin"


@pytest.mark.parametrize(
    "flags",
    [
        ["--remove-bpe", "subword_nmt", "--prefix-size", 2],
        ["--tokenizer", "moses", "--nbest", 2],
        ["--post-process", "sentencepiece"],
        ["--bpe", "sentencepiece", "--sentencepiece-model", "{}/spm.model", "--scoring", "chrf"],
        ["--gen-subset", "test"],
        ["--print-alignment", "hard"],
        ["--score-reference"],
    ],
    ids=lambda flags: " ".join(map(str, flags[:2])),
)
def test_lines_of_a_batch_are_those_of_fairseqs_loop(unknown_bin, dense, tmp_path, flags):
    """With unknown words, which a reference shows as <<unk>> and BLEU never matches."""
    common = [unknown_bin, "-s", "en", "-t", "de", "--path", dense, "--gen-subset", "valid"]
    flags = [*common, "--beam", 3, "--batch-size", 16, *(str(flag).format(unknown_bin) for flag in flags)]
    stock = run("fairseq-generate", *PLUGIN, *flags, "--cpu", "--required-batch-size-multiple", 1, "--num-workers", 0)
    ap_generate(*flags, "--results-path", tmp_path)
    (file,) = tmp_path.iterdir()
    ours = file.read_text("utf-8").splitlines()
    score = [line for line in stock.splitlines() if line.startswith("Generate ")]
    assert ours == sentence_lines(stock) + score and "<unk>" in "".join(ours)
    assert bool(score) == ("<<unk>>" in "".join(ours)) == ("test" not in flags)


def test_new_words_have_numbers_of_their_own():
    """In a dictionary with a word twice, as CamemBERT's, the first new word had the number of the last word."""
    words = Dictionary()
    for word in ("a", "b", "a"):
        words.add_symbol(word, overwrite=True)
    task = SimpleNamespace(target_dictionary=words, build_bpe=lambda _: None, build_tokenizer=lambda _: None)
    cfg = SimpleNamespace(bpe=None, tokenizer=None, common_eval=SimpleNamespace(post_process="subword_nmt"))
    lines = BatchLines(cfg, task, SimpleNamespace(eos=words.eos()), None, Path())
    line = "a b new <unk> other new"
    assert lines._encode(line) == words.encode_line(line, add_if_not_exist=True).tolist()


def test_a_line_feed_that_a_bpe_spells_ends_no_line():
    """The rest of the hypothesis was lost, and its score was of what came before."""
    task = SimpleNamespace(
        target_dictionary=Dictionary(),
        build_bpe=lambda _: SimpleNamespace(decode=lambda text: text.replace("<0x0A>", "\n")),
        build_tokenizer=lambda _: None,
    )
    cfg = SimpleNamespace(bpe="bytes", tokenizer=None, common_eval=SimpleNamespace(post_process=None))
    lines = BatchLines(cfg, task, SimpleNamespace(eos=task.target_dictionary.eos()), None, Path())
    assert lines._decode("one<0x0A>two") == "one two"


def test_one_process_samples_what_fairseq_generate_samples(data_bin, dense):
    """Loading a model takes random numbers, which come before those of the samples."""
    flags = [data_bin, "--path", dense, "--gen-subset", "valid", "--sampling", "--beam", 1, "--seed", 3]
    stock = run("fairseq-generate", *PLUGIN, *flags, "--cpu", "--required-batch-size-multiple", 1, "--num-workers", 0)
    assert sentence_lines(ap_generate(*flags, "--num-processes", 1)) == sentence_lines(stock)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_models_are_loaded_whole(data_bin, dense, tmp_path, monkeypatch, zipped):
    state = load_checkpoint(dense)
    state["last_optimizer_state"] = {"state": torch.zeros(1 << 20)}
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    stock, used = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *args, **options: used.append(options) or stock(*args, **options))
    monkeypatch.setattr(checkpoint_utils, "load_model_ensemble_and_task", checkpoint_utils.load_model_ensemble_and_task)
    load_faster(on_gpu=True)
    torch.manual_seed(1)
    (model,), _ = checkpoint_utils.load_model_ensemble([str(tmp_path / "model.pt")], {"data": str(data_bin)})
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))  # nothing was drawn for parameters that the checkpoint holds
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["model"][name]), name
    assert [options.get("mmap", False) for options in used] == [zipped]
    buffer = io.BytesIO((tmp_path / "model.pt").read_bytes())  # a ValueError: such cannot be mapped
    assert torch.load(buffer, weights_only=False).keys() == state.keys()


@pytest.mark.parametrize(
    "flags", [["--checkpoint-suffix=-last"], ["--checkpoint-shard-count", 2]], ids=["suffix", "shards"]
)
def test_models_in_other_files_than_path_are_found(data_bin, dense, tmp_path, flags):
    """fairseq makes names from --path, which the command and the settings of a text's parts looked for themselves."""
    for name in ("model-last.pt", "model_part0.pt", "model_part1.pt"):
        shutil.copy(dense, tmp_path / name)
    (tmp_path / "in").write_text("the page opens\n", "utf-8")
    common = [data_bin, "--input", tmp_path / "in", "--beam", 1]
    ap_generate(*common, "--path", dense, "-o", tmp_path / "whole")
    ap_generate(*common, "--path", tmp_path / "model.pt", *flags, "-o", tmp_path / "out")
    assert (tmp_path / "out").read_text("utf-8") == (tmp_path / "whole").read_text("utf-8") != ""


def test_tasks_with_batches_and_generators_of_their_own(data_bin, toy_text, tmp_path):
    """With tokens of languages: a KeyError in a test set, a TypeError in a text, which would have kept the token."""
    languages = ["--task", "translation_multi_simple_epoch", "--lang-pairs", "en-de", "--langs", "en,de"]
    languages += ["--encoder-langtok", "tgt", "--decoder-langtok"]
    train(data_bin, tmp_path, *languages, "--attention-masks", "none", arch="pruned_transformer", updates=5)
    flags = [data_bin, "--path", tmp_path / "checkpoint_last.pt", *languages, "-s", "en", "-t", "de", "--beam", 2]
    flags += ["--max-len-b", 9, "--max-len-a", 0]
    stock = run("fairseq-generate", *PLUGIN, *flags, "--cpu", "--required-batch-size-multiple", 1, "--num-workers", 0)
    ours = ap_generate(*flags)
    assert sentence_lines(ours) == sentence_lines(stock) and len(sentence_lines(ours)) == 5 * 220
    ap_generate(*flags, "--input", toy_text / "test.en", "-o", tmp_path / "out")
    detokenised = [line.split("\t")[2] for line in sentence_lines(stock) if line.startswith("D-")]
    assert (tmp_path / "out").read_text("utf-8").splitlines() == detokenised


def test_a_process_without_a_batch_and_quiet(data_bin, dense):
    """One batch for two processes: fairseq-generate divides by zero where its shard has none."""
    flags = [data_bin, "--path", dense, "--gen-subset", "valid", "--batch-size", 60]
    runs = [ap_generate_process(*flags, *more) for more in ([], ["--quiet"])]
    whole, quiet = (run.stdout.splitlines() for run in runs)
    assert "Warning" not in runs[0].stderr and "hydra" not in runs[0].stderr  # 25 lines that tell a user nothing
    assert [line[:3] for line in whole[:6]] == ["S-0", "T-0", "H-0", "D-0", "P-0", "S-1"]
    assert len(whole) == 5 * 60 + 1 and quiet == whole[-1:]


def test_lines_of_a_run_that_was_killed_are_not_those_of_the_next(data_bin, dense, tmp_path):
    """The same command found them where it writes its own, and printed and scored both."""
    flags = [data_bin, "--path", dense, "--gen-subset", "valid", "--batch-size", 60, "--beam", 1]
    expected = ap_generate_process(*flags).stdout
    for rank in range(2):  # the second has no batch this time
        folder = tmp_path / "generate-valid.txt.parts" / f"rank{rank}"
        folder.mkdir(parents=True)
        for name in ("lines0.txt", "lines1.txt", "generate-valid.txt"):
            (folder / name).write_text("S-0\tof another model\n", "utf-8")
    ap_generate(*flags, "--results-path", tmp_path)
    assert (tmp_path / "generate-valid.txt").read_text("utf-8") == expected


def test_a_text_keeps_its_lines(data_bin, dense, toy_text, tmp_path):
    """The hypotheses of fairseq-interactive, line by line; an empty line stays empty, also where only spaces are."""
    lines = (toy_text / "valid.en").read_text("utf-8").splitlines()[:7]
    lines[2:2] = ["", "   "]
    text = "".join(f"{line}\n" for line in lines).removesuffix("\n")
    stock = run("fairseq-interactive", data_bin, *PLUGIN, "--path", dense, "--cpu", input=text)
    hypotheses = re.findall(r"^D-\d+\t\S+\t(.*)$", stock, re.MULTILINE)
    hypotheses[2:4] = ["", ""]
    done = ap_generate_process(data_bin, "--path", dense, "--input", "-", "--buffer-size", 4, text=text)
    assert done.stdout.split("\n") == [*hypotheses, ""] and len(hypotheses) == 9
    assert "9 lines translated" in done.stderr


def test_subwords_that_are_missing_or_made_twice_are_warned_of(data_bin, dense, toy_text, tmp_path, caplog):
    """A forgotten --bpe translated unknown words, and one too many subwords of subwords."""
    folder, words = tmp_path / "data-bin", tmp_path / "in"
    folder.mkdir()
    for file in data_bin.glob("dict.*.txt"):
        (folder / file.name).write_text("".join(f"▁{line}\n" for line in file.read_text("utf-8").splitlines()), "utf-8")
    words.write_text("the page opens\n\n" * 2, "utf-8")
    flags = [folder, "--path", dense, "--input", words, "--output", tmp_path / "out", "--buffer-size", 1]
    assert "no text that names its languages; give --source-lang and --target" in ap_generate(*flags, expect=2)
    log = ap_generate(*flags, "-s", "en", "-t", "de")
    assert log.count(f"the model reads subwords (▁ or @@), and {words} has none") == 1
    for symbols, line, has_bpe, warning in (
        (["▁the", "▁page"], "▁the ▁page", False, None),
        (["the", "pa@@", "ge"], "the page", False, "the model reads subwords (▁ or @@), and in has none"),
        (["the", "pa@@", "ge"], "the pa@@ ge", False, None),
        (["the", "page"], "the page", False, None),
        (["the", "pa@@", "ge"], "the page", True, None),
        (["the", "pa@@", "ge"], "the pa@@ ge", True, "in has subwords (▁ or @@), of which --bpe makes subwords"),
    ):
        words.write_text(f"{line}\n", "utf-8")
        task = SimpleNamespace(source_dictionary=SimpleNamespace(symbols=symbols))
        caplog.clear()
        generation_text._warn_of_subwords(Text.scan(words, "in", 1), task, has_bpe)
        assert [message.startswith(warning or " ") for message in caplog.messages] == [True] * (warning is not None)


def test_a_text_that_was_cut_goes_on(data_bin, dense, toy_text, tmp_path):
    """Sampled by two processes that are killed with their parent, then resumed: the text that one run samples."""
    flags = [data_bin, "--path", dense, "--input", toy_text / "test.en", "--buffer-size", 10]
    flags += ["--sampling", "--beam", 1, "--seed", 5, "--batch-size", 1]
    ap_generate(*flags, "--output", tmp_path / "whole.de", "--num-processes", 1)
    output, folder = tmp_path / "cut.de", tmp_path / "cut.de.parts"
    process = start(*flags, "--output", output)
    wait_for(lambda: len(list(folder.glob("part*.txt"))) >= 3)
    ranks = children(process)
    process.kill()
    process.communicate()
    assert len(ranks) == 2
    wait_for(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))
    made = len(list(folder.glob("part*.txt")))
    assert 3 <= made < 22 and not output.exists()

    changed = ap_generate(*flags, "--output", output, "--sampling-topk", 4, expect=2)
    assert "--sampling-topk was -1 and is 4 now" in changed and "remove the folder" in changed
    other = ap_generate(data_bin, "--path", dense, "--input", toy_text / "valid.en", "--output", output, expect=2)
    assert "holds parts of a translation with other settings" in other

    resumed = ap_generate(*flags, "--output", output)
    assert f"{made} of 22 parts were translated before" in resumed
    assert output.read_text("utf-8") == (tmp_path / "whole.de").read_text("utf-8")
    assert len(output.read_text("utf-8").splitlines()) == 220 and not folder.exists()
    assert "pass --overwrite" in ap_generate(*flags, "--output", output, expect=2)


def test_lines_that_are_too_long(data_bin, dense, tmp_path):
    """Refused by number, or cut; what was translated before the refusal is kept."""
    (tmp_path / "in").write_text("the page opens\n" * 3 + "the page " * 20 + "\n", "utf-8")
    flags = [data_bin, "--path", dense, "--input", tmp_path / "in", "--output", tmp_path / "out", "--buffer-size", 2]
    flags += ["--max-source-positions", 12, "--num-processes", 1]
    error = ap_generate(*flags, expect=2).splitlines()[-1]
    assert "line 4 has 41 tokens, the model reads at most 12" in error and "--truncate-source" in error
    assert not (tmp_path / "out").exists()
    log = ap_generate(*flags, "--truncate-source")
    assert "1 of 2 parts were translated before" in log and "1 lines were cut" in log
    assert len((tmp_path / "out").read_text("utf-8").splitlines()) == 4


def test_a_text_that_was_mended_is_translated(data_bin, dense, tmp_path):
    """The first line was too long: after it had been split, as the message says, the empty parts were in the way."""
    flags = [data_bin, "--path", dense, "--input", tmp_path / "in", "--output", tmp_path / "out"]
    flags += ["--max-source-positions", 12]
    (tmp_path / "in").write_text("the page " * 20 + "\n", "utf-8")
    assert "line 1 has 41 tokens" in ap_generate(*flags, expect=2)
    (tmp_path / "in").write_text("the page \n" * 20, "utf-8")
    ap_generate(*flags)
    assert len((tmp_path / "out").read_text("utf-8").splitlines()) == 20


@pytest.mark.parametrize("kind", ["text", "subset"])
def test_nothing_is_lost_where_standard_output_takes_nothing(data_bin, dense, toy_text, tmp_path, kind):
    """All was translated, then lost, with a traceback."""
    flags = [data_bin, "--path", dense, *(["--input", toy_text / "valid.en"] if kind == "text" else ["--quiet"])]
    command = [*AP_GENERATE, *TWO, *map(str, flags)]
    environment = {**ENVIRONMENT, "TMPDIR": str(tmp_path)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, timeout=300)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "standard output could not be written ([Errno 28] No space left" in error
    kept = Path(re.search(r"all that belongs there is in (\S+)$", error)[1])
    assert kept.read_text("utf-8") == ap_generate_process(*flags).stdout and kept.is_relative_to(tmp_path)


@pytest.mark.parametrize(
    ("flags", "descriptor", "message"),
    [
        (["--input", "-", "--output", "out"], 0, "--input -: standard input is closed; name a text with --input FILE"),
        (["--input", "-"], 1, "standard output is closed; open it, or name the result with --output FILE"),
        ([], 1, "standard output is closed; open it, or name the result with --results-path DIR"),
    ],
)
def test_streams_that_are_closed_are_named(data_bin, dense, tmp_path, flags, descriptor, message):
    """They ended in tracebacks, after all had been translated."""
    command = [*AP_GENERATE, *TWO, str(data_bin), "--path", str(dense), *flags]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {descriptor}>&-', "sh", *command],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and done.stderr.endswith(f"error: {message}\n"), done.stderr[-2000:]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["dense", "missing.pt"])
def test_messages_that_nobody_reads_are_not_among_the_lines(data_bin, dense, model):
    """Without standard error a traceback ended the run, and messages went to standard output."""
    flags = [data_bin, "--path", dense if model == "dense" else model, "--gen-subset", "valid", "--beam", "1"]
    expected = ap_generate_process(*flags).stdout if model == "dense" else ""
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *AP_GENERATE, *TWO, *map(str, flags)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)})
    assert done.stdout == expected and done.returncode == (0 if model == "dense" else 2)


def test_masks_of_the_other_direction_are_announced(data_bin, dense, masks_file, tmp_path):
    """With one dictionary for both languages any direction is translated, without a word."""
    (tmp_path / "in").write_text("the page opens\n", "utf-8")
    run("ap-apply", dense, "--attention-masks", masks_file, "-o", tmp_path / "pruned.pt")
    flags = [data_bin, "--path", tmp_path / "pruned.pt", "--input", tmp_path / "in"]
    notice = "the masks were recorded in another direction: en to de, the data are de to en"
    assert ap_generate(*flags, "--source-lang", "de", "--target-lang", "en").count(notice) == 1
    assert "another direction" not in ap_generate(*flags)


def _print_bytes(rank, translator, text, folder, todo, ranks):
    os.write(1, b"\xff\nline 1 was cut from 9 to 8 tokens\n")
    (folder / "part000000.txt").touch()


def test_bytes_in_a_log_that_are_no_text_end_no_translation(tmp_path, monkeypatch, caplog):
    """A library may print any: the text was translated, and then a UnicodeDecodeError ended the program."""
    monkeypatch.setattr(generation_text, "settings", lambda *_: {})
    monkeypatch.setattr(generation_text, "setup_task", lambda _: None)
    monkeypatch.setattr(generation_text, "translate_parts", _print_bytes)
    (tmp_path / "in").write_text("one\n")
    text = Text.scan(tmp_path / "in", "in", 2)
    cfg = argparse.Namespace(common=argparse.Namespace(cpu=True), task=None, bpe="characters")
    with ranks.Ranks([tmp_path / "rank0.log"], cpu=True) as one:
        one.load(str)
        assert generation_text.translate_text(None, cfg, text, one, tmp_path) == [tmp_path / "part000000.txt"]
    assert "1 lines were cut" in caplog.text


@pytest.fixture
def running(data_bin, dense, tmp_path):
    """A translation of the training data that takes a while, and its two processes; it is ended after the test."""
    flags = ["--gen-subset", "train", "--batch-size", 1, "--min-len", 30]
    process = start(data_bin, "--path", dense, *flags, "--results-path", tmp_path)
    logs = [tmp_path / "generate-train.txt.parts" / f"rank{rank}.log" for rank in range(2)]
    try:
        wait_for(lambda: process.poll() or all(log.exists() and "progress_bar |" in log.read_text() for log in logs))
        yield process, children(process)
    finally:
        process.kill()
        process.communicate()


def test_a_process_that_dies_ends_the_run(running, tmp_path):
    process, ranks = running
    os.kill(ranks[1], signal.SIGKILL)
    _, log = process.communicate(timeout=120)
    left = tmp_path / "generate-train.txt.parts"
    assert process.returncode == 2 and "process 1 died of SIGKILL, the others were ended" in log, log[-3000:]
    assert f"the end of its log {left / 'rank1.log'}" in log and "Traceback" not in log
    assert sorted(path.name for path in left.iterdir()) == ["rank0.log", "rank1.log"]
    assert [path.name for path in tmp_path.iterdir()] == [left.name]
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_an_interrupted_text_says_where_its_parts_are(tmp_path, caplog):
    caplog.set_level("INFO")
    with pytest.raises(KeyboardInterrupt), generate._work_folder(tmp_path / "out.parts", keep=("part",)) as folder:
        (folder / "part000000.txt").touch()
        raise KeyboardInterrupt
    assert f"what is done is in {folder}; the same command goes on" in caplog.text
    assert [path.name for path in folder.iterdir()] == ["part000000.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_ended_run_leaves_no_temporary_folder(data_bin, dense, tmp_path, number, request):
    """SIGHUP, of a terminal that is closed, left that of the command, and each signal that of the reader's sockets."""
    if number == signal.SIGHUP:  # ignored under nohup, also by the command, which inherits that
        request.addfinalizer(functools.partial(signal.signal, number, signal.signal(number, signal.SIG_DFL)))
    flags = ["--gen-subset", "train", "--batch-size", 1, "--min-len", 30, "--num-workers", 1]
    process = start(data_bin, "--path", dense, *flags, TMPDIR=str(tmp_path))
    try:
        wait_for(lambda: process.poll() or len([*tmp_path.glob("ap-generate-*/rank?/lines0.txt")]) == 2)
        process.send_signal(number)
        _, log = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 128 + number and "Traceback" not in log, log[-3000:]
    assert not any(tmp_path.glob("*-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_processes(running, tmp_path, number):
    process, ranks = running
    process.send_signal(number)
    _, log = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "Traceback" not in log, log[-3000:]
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert not (tmp_path / "generate-train.txt").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-shards", "2"], "--num-shards has no meaning for ap-generate; --num-processes N says"),
        (["--distributed-world-size=2"], "--distributed-world-size has no meaning for ap-generate; --num-processes"),
        (["--log-format", "json"], "--log-format has no meaning for ap-generate; the progress of all processes"),
        (["--output", "x"], "--output has no meaning for ap-generate; the lines of a test set go to standard output"),
        (["--input", "x", "--gen-subset", "test"], "--gen-subset has no meaning for ap-generate --input; with --input"),
        (["--input", "x", "--nbest", "2"], "--nbest 2: with --input each line has one translation"),
        (["--input", "x", "--sampling"], "--sampling --beam 5: with --input each line has one sample; give --beam 1"),
        (["--input", "missing"], "missing does not exist; expected a text file with one sentence a line"),
        (["--num-processes", "0"], "--num-processes 0: at least one process translates"),
        (["--path", "missing.pt"], "missing.pt does not exist; expected a fairseq checkpoint"),
        (["-ox"], "-o has no meaning for ap-generate; the lines of a test set go to standard output"),
        (["--gen-subset", "tset"], "--gen-subset tset: "),
        (["--target-lang", "fr"], "--target-lang fr: "),
        (["--task", "language_modeling"], "--task language_modeling: "),
        (["--user-dir", "missing"], "--user-dir missing: there is no such folder"),
        (["--beam", "0"], "--beam 0: a search keeps and returns at least 1 hypothesis"),
        (["--remove-bpe", "bpe"], "--remove-bpe bpe: fairseq joins the tokens of sentencepiece, subword_nmt"),
        (["--nbest", "0"], "--nbest 0: a search keeps and returns at least 1 hypothesis"),
        (["--constraints"], "--constraints has no meaning for ap-generate; fairseq-interactive reads them"),
        (
            ["--input", "x", "--constraints"],
            "--constraints has no meaning for ap-generate --input; fairseq-interactive",
        ),
        (["--temperature", "0"], "--temperature 0.0: scores are divided by it; give a number above 0"),
        (["--temperature", "nan"], "--temperature nan: give a finite number"),
        (["--lenpen", "nan"], "--lenpen nan: give a finite number"),
        (["--max-len-a", "1e400"], "--max-len-a inf: give a finite number"),
        (["--num-workers", "-1"], "--num-workers -1 is not a number of processes; give 0 or more"),
        (["--seed", "-1"], "--seed -1: numpy's random numbers take one from 0 to 4294967295"),
        (["--model-overrides", "x"], "--model-overrides 'x' is not a Python dictionary such as"),
        (["--sampling"], "--sampling --beam 5 --nbest 1: each hypothesis is a sample; give both one number"),
        (["--lm-path", "missing.pt"], "missing.pt does not exist; expected a fairseq checkpoint of a language model"),
        (["--lm-path", __file__], f"--lm-path {__file__}: fairseq reads its dictionary from "),
        (["--input", "x", "--buffer-size", "-2"], "--buffer-size -2 is not a number of lines"),
        (["--input", "x", "--bpe", "sentencepiece"], "--bpe sentencepiece needs --sentencepiece-model"),
        (["--bpe", "sentencepiece", "--sentencepiece-model", "no.model"], "--bpe sentencepiece: file no.model not"),
        (["--bpe", "sentencepiece", "--sentencepiece-model", __file__], "--bpe sentencepiece: "),
        (["--tokenizer", "moses"], "--tokenizer moses needs --source-lang and --target-lang"),
        (["--scoring", "bert_score"], "--scoring bert_score: Please install BERTScore: pip install bert-score"),
    ],
)
def test_what_has_no_meaning_is_refused(data_bin, dense, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        generate.main([str(data_bin), "--path", str(dense), "--cpu", *flags])
    assert stop.value.code == 2 and f"error: {message}" in capsys.readouterr().err


def test_files_that_cannot_be_used_are_named(data_bin, dense, tmp_path, capsys, monkeypatch):
    """They ended in tracebacks, and left empty temporary folders behind."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    cut, text, bad, output = (tmp_path / name for name in ("cut.pt", "in", "bad", "out"))
    cut.write_bytes(Path(dense).read_bytes()[:5000])
    text.write_text("the page opens\n", "utf-8")
    bad.write_bytes(b"\xff\n")

    def error(*flags):
        with pytest.raises(SystemExit):
            generate.main([str(data_bin), "--path", str(dense), "--cpu", *map(str, flags)])
        return capsys.readouterr().err

    assert f"{cut} is empty or cut off, expected a fairseq checkpoint; copy it" in error("--path", cut, "--input", text)
    assert "line 1 is not UTF-8" in error("--input", bad) and not any((tmp_path / "temporary").iterdir())
    parts = tmp_path / "out.parts"
    assert "line 1 is not UTF-8" in error("--input", bad, "--output", output) and not parts.exists()
    parts.write_text("")
    assert f"{parts} is a file, a folder of this name holds" in error("--input", text, "--output", output)
    parts.unlink()
    parts.mkdir()
    (parts / "part000000.txt").touch()
    assert f"{parts} holds parts of a translation and no translation.json" in error("--input", text, "--output", output)
    (parts / "translation.json").write_text("{")
    assert "translation.json is damaged (Expecting" in error("--input", text, "--output", output)
    flags = ["--input", text, "--max-tokens", 3]
    assert f"{text} line 1 has 4 tokens, a batch at most --max-tokens 3; raise it" in error(*flags)
    assert [path.name for left in (tmp_path / "temporary").iterdir() for path in left.iterdir()] == ["rank0.log"]


def test_sentences_that_cannot_be_read_are_named(data_bin, dense, tmp_path):
    """Each was a traceback of fairseq's or torch's at the end of a log."""
    common, text = ["--path", dense, "--gen-subset", "valid", "--num-processes", 1], tmp_path / "valid.en-de.de.bin"
    shutil.copytree(data_bin, tmp_path, dirs_exist_ok=True)
    for cut, message in ((slice(0), "it is damaged, or of other text"), (slice(10), "has 10 bytes, its index says")):
        text.write_bytes((data_bin / text.name).read_bytes()[cut])
        assert f"{text} has" in (said := ap_generate(tmp_path, *common, expect=2)) and message in said
    text.unlink()
    assert f"{text} is missing beside its index; copy the" in ap_generate(tmp_path, *common, expect=2)
    said = ap_generate(data_bin, *common, "--max-tokens", 3, expect=2)
    assert "--gen-subset valid: Sentences lengths should not exceed max_tokens=3; raise --max-tokens" in said
    said = ap_generate(data_bin, *common, "--max-source-positions", 3, expect=2)
    assert "--gen-subset valid: Size of sample" in said and "--skip-invalid-size-inputs-valid-test" in said


def _note(rank, folder, *_):
    (folder / f"ran{rank}").touch()


def test_processes_start_before_their_work_is_known(tmp_path, monkeypatch):
    """Those that have none by the end are ended at once; one that has died by then is reported as any other."""

    def start(log, program, args):
        (tmp_path / f"started{args[0]}").touch()
        if args[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        processes.run_logged(log, program, args)

    monkeypatch.setattr(ranks, "run_logged", start)
    logs = [tmp_path / f"rank{rank}.log" for rank in range(3)]
    for work in (lambda _: None, lambda three: three.run("note", 2, _note, tmp_path)):
        with ranks.Ranks(logs, cpu=True) as three:
            wait_for(lambda: len(list(tmp_path.glob("started*"))) == 3)
            assert not any(tmp_path.glob("ran?"))
            work(three)
        assert not any(process.is_alive() for process in three.processes)
    assert sorted(path.name for path in tmp_path.glob("ran?")) == ["ran0", "ran1"]
    with pytest.raises(generate.UserError, match="process 2 died of SIGKILL"), ranks.Ranks(logs, cpu=True) as three:
        three.processes[2].join()
        three.run("note", 3, _note, tmp_path, "x" * (1 << 20))


def _stay(_, folder):
    (folder / "pid").write_text(str(os.getpid()))
    threading.Thread(target=time.sleep, args=(300,)).start()  # as a GPU that takes long to be given back


def _do_work_and_leave(folder):
    with ranks.Ranks([folder / "rank0.log"], cpu=True) as one:
        one.run("stay", 1, _stay, folder)
        ranks.count_gpus = lambda _: 1
    assert one.processes[0].is_alive()


def test_nothing_waits_for_processes_on_gpus_that_have_done_their_work(tmp_path):
    """A command waited until each had given its GPU back. They end with it all the same."""
    command = multiprocessing.get_context("fork").Process(target=_do_work_and_leave, args=(tmp_path,))
    command.start()
    command.join(60)
    pid = (tmp_path / "pid").read_text()
    assert command.exitcode == 0
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_processes_are_ended_where_not_all_of_them_start(tmp_path, monkeypatch, error):
    """Those that had started waited for work for ever, and the command for their end."""
    started, stock = [], processes.PROCESSES.Process.start

    def start(process):
        if started:
            raise error
        started.append(process)
        stock(process)

    monkeypatch.setattr(processes.PROCESSES.Process, "start", start)
    with pytest.raises(error), ranks.Ranks([tmp_path / f"rank{rank}.log" for rank in range(3)], cpu=True):
        pass
    (process,) = started
    assert process.exitcode == -signal.SIGKILL


def test_a_log_on_a_full_disk_is_said_to_be_on_one(tmp_path, monkeypatch):
    """The message ended with an empty log, or one that was cut off, as if that had been at fault."""
    (tmp_path / "rank0.log").touch()
    monkeypatch.setattr(ranks.shutil, "disk_usage", lambda _: argparse.Namespace(free=4096))
    message = ranks._failure(0, 1, tmp_path / "rank0.log")
    assert f": 4,096 bytes are free on the disk of {tmp_path}, expected at least 1,048,576; make room" in message


def test_processes_are_as_many_as_gpus_or_share_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert generate.count_ranks(None, cpu=False) == 2 and generate.count_ranks(None, cpu=True) == 1
    assert generate.count_ranks(3, cpu=False) == generate.count_ranks(3, cpu=True) == 3
    for name in ("threading.Thread", "gc.freeze", "load_faster"):
        monkeypatch.setattr(f"ap_fairseq.generation.ranks.{name}", Mock())
    started, devices, seen = [], [], []
    monkeypatch.setattr(ranks, "start_cuda", lambda: started.append(True))
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    for visible, rank in ((None, 0), (None, 1), (None, 2), ("3, GPU-8f", 0), ("3, GPU-8f", 1)):
        with monkeypatch.context() as process:
            process.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # and is again what it was
            if visible is not None:
                process.setenv("CUDA_VISIBLE_DEVICES", visible)
            count = Mock(side_effect=[2, 1])  # the second time of those that this process sees
            process.setattr(torch.cuda, "device_count", count)
            work = 3, (lambda _: seen.append(os.environ["CUDA_VISIBLE_DEVICES"])), ()
            ranks._run(rank, False, Mock(recv=lambda work=work: work))
    assert seen == ["0", "1", "0", "3", "GPU-8f"] and len(started) == 5 and devices == []
    for rank in range(3):  # without NVML, counting starts CUDA, which sees both from then on
        with monkeypatch.context() as process:
            process.setenv("CUDA_VISIBLE_DEVICES", "0,1")
            ranks._run(rank, False, Mock(recv=lambda: (3, Mock(), ())))
    assert devices == [0, 1, 0] and len(started) == 5


def _read(_, file):
    file.read_text()


def test_a_file_that_a_process_misses_is_one_line(tmp_path):
    """As in a command, not a traceback at the end of a log."""
    with ranks.Ranks([tmp_path / "rank0.log"], cpu=True) as one, pytest.raises(generate.UserError) as error:
        one.run("read", 1, _read, tmp_path / "gone")
    found = (
        f"[Errno 2] No such file or directory: '{tmp_path / 'gone'}' (process 0; its log is {tmp_path / 'rank0.log'})"
    )
    assert str(error.value) == found


def _load(file):
    file.with_name("loading").touch()
    return file.read_text()


def _note_loaded(rank, loaded, file):
    file.with_name(f"loaded{rank}").write_text(loaded)


def test_processes_load_before_their_work_is_known(tmp_path):
    """Models were read only after a text had been read, and the checkpoint hashed."""
    logs = [tmp_path / f"rank{rank}.log" for rank in range(2)]
    (tmp_path / "model").write_text("parameters")
    with ranks.Ranks(logs, cpu=True) as two:
        two.load(_load, tmp_path / "model")
        wait_for((tmp_path / "loading").exists)
        two.run("note", 2, _note_loaded, tmp_path / "model")
    assert [(tmp_path / f"loaded{rank}").read_text() for rank in range(2)] == ["parameters"] * 2
    with ranks.Ranks(logs, cpu=True) as two, pytest.raises(generate.UserError, match="^.Errno 2. No such file .*gone"):
        two.load(_load, tmp_path / "gone")
        two.processes[0].join()
        two.run("note", 2, _note_loaded, tmp_path / "gone")


def _note_threads(_, file):
    file.write_text(str(torch.get_num_threads()))


def test_processes_that_have_work_share_the_cores(tmp_path):
    """A text of one part had a third of the threads where three processes had been asked for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        for n, expected in ((1, "6"), (3, "2")):
            with ranks.Ranks([tmp_path / f"rank{rank}.log" for rank in range(3)], cpu=True) as three:
                three.run("note", n, _note_threads, tmp_path / "threads")
            assert (tmp_path / "threads").read_text() == expected
    finally:
        torch.set_num_threads(threads)


def test_the_command_itself_does_without_triton(data_bin, dense):
    """Its end was thirty lines about leaks, since it froze objects of a library that looks for them."""
    done = ap_generate_process(data_bin, "--path", dense, "--gen-subset", "valid", "--beam", 1, "--num-processes", 1)
    assert "translated 60 sentences" in done.stderr.splitlines()[-1]


def test_parts_of_a_text_are_its_lines(tmp_path):
    """Only a line feed ends a line: not a form feed, nor Unicode's separators; the last may lack it.

    A byte order mark belonged to the first word; only the first line can have one.
    """
    lines = ["\ufeffone\x0cone", "two\u2028two", "\ufeff", "four\r", "five"]
    (tmp_path / "in").write_bytes("\n".join(lines).encode())
    text = Text.scan(tmp_path / "in", "in", 2)
    assert (text.lines, len(text.offsets)) == (5, 3)
    assert [text.part(k) for k in range(3)] == [["one\x0cone", "two\u2028two"], ["\ufeff", "four"], ["five"]]
    (tmp_path / "in").write_bytes("\n".join([*lines, "six"]).encode())  # it grew after it was read
    assert text.part(1) == ["\ufeff", "four"]
    with pytest.raises(generate.UserError, match="in changed while it was translated"):
        text.part(2)
    (tmp_path / "bad").write_bytes(b"fine\n\xff\n")
    with pytest.raises(generate.UserError, match="bad line 2 is not UTF-8"):
        Text.scan(tmp_path / "bad", "bad", 2)


@pytest.mark.parametrize(("lines", "part"), [(0, 2000), (100, 2000), (40_001, 2501), (10**6, 20_000)])
def test_parts_of_a_long_text_fill_large_batches_on_a_gpu(lines, part, tmp_path):
    """Parts of 2,000 lines, one or two batches of 49,152 tokens, took twice as long as the same text in a data-bin."""
    (tmp_path / "in").write_bytes(b"a\n" * lines)
    assert default_part_lines(tmp_path / "in", cpu=False) == part
    assert default_part_lines(tmp_path / "in", cpu=True) == 2000


def test_a_line_that_a_bpe_of_bytes_spells_stays_in_one_line():
    """A line feed in one translation shifted all lines after it."""
    translator = Translator.__new__(Translator)
    translator.hub, translator.stripped, translator.post_process = Mock(), set(), None
    translator.hub.detokenize.return_value = "one\ntwo"
    found = Found(lines=np.array([0]), tokens=np.array([4, 2]), lengths=np.array([2]))
    assert translator.decode(2, [found]) == ["one two", ""]
