"""The benchmark of translation and training runs on a CPU, and sums up what a GPU's profiler reports."""

import argparse
import functools
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import bench_fairseq as bench
import dense_checkpoint
import fairseq_workloads as workloads
import pytest
import rival_ctranslate2 as rival
import sacrebleu
import torch
from plugin.builders import batch, dense_model, dictionary
from plugin.commands import ROOT, run

from ap_fairseq.files import UserError
from ap_fairseq.model.checkpoints import load_checkpoint
from ap_fairseq.model.conversion import apply_masks

VOCAB = dictionary()


def test_systems_translate_and_train_on_a_cpu(data_bin, tmp_path):
    out = tmp_path / "rows.json"
    cases = [case for case in bench.cases_of("transformer_tiny") if "sentences" in case]
    printed = run(
        *[sys.executable, ROOT / "scripts/bench_fairseq.py", data_bin, "--device", "cpu", "--limit", 6],
        *["--arch", "transformer_tiny", "--rounds", 1, "--max-tokens", 200, "--commit", "abc1234", "--out", out],
        *["--systems", "stock", "80", "--cases", *cases],
    )
    report = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["system"], row["case"]) for row in report["rows"]] == [
        (system, case) for system in ("stock", "80") for case in cases
    ]
    assert all(row["commit"] == "abc1234" and row["tokens_per_s"] > 0 for row in report["rows"])
    translated = [row for row in report["rows"] if row["kind"] == "translate"]
    assert {row["sentences"] for row in translated} == {6}
    assert len({row["tokens"] for row in translated if row["case"] == "sentences"}) == 1
    assert bench.table(report) in printed


def test_a_checkpoint_brings_its_own_sizes(dense, data_bin, masks_file, tmp_path):
    """Sizes were those of --arch, which no trained model has but by chance: parameters did not fit."""
    ones, out = tmp_path / "ones.pt", tmp_path / "rows.json"
    apply_masks(dense, "none", ones, str(data_bin))
    run(
        *[sys.executable, ROOT / "scripts/bench_fairseq.py", data_bin, "--device", "cpu", "--limit", 6, "--out", out],
        *["--path", ones, "--rounds", 1, "--systems", "stock", "all-ones", "int8", "--cases", "sentences"],
    )
    stock, ours, int8 = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert stock["bleu"] == ours["bleu"] and stock["tokens"] == ours["tokens"]
    assert int8["bleu"] >= 0 and int8["tokens"]
    state = load_checkpoint(dense)["cfg"]["model"]
    layers = f"{state.encoder_layers} + {state.decoder_layers} layers of width {state.decoder_embed_dim}"
    assert layers in dense_checkpoint.architecture_of(dense)

    (tmp_path / "dict.en.txt").write_text("a 1\n", encoding="utf-8")
    (tmp_path / "test.en-de.en.idx").touch()
    with pytest.raises(UserError, match="5; name the data"), dense_checkpoint.stock_checkpoint(dense, str(tmp_path)):
        pass
    apply_masks(dense, masks_file, tmp_path / "half.pt", str(data_bin))
    with pytest.raises(UserError, match="would compute the pruned pairs"):
        dense_checkpoint.stock_checkpoint(tmp_path / "half.pt", str(data_bin)).__enter__()
    state = {"args": argparse.Namespace(arch="transformer_lm"), "model": {"decoder.embed_tokens.weight": torch.ones(1)}}
    torch.save(state, tmp_path / "lm.pt")
    with pytest.raises(UserError, match="is of the architecture 'transformer_lm'; give a translation model"):
        dense_checkpoint.stock_checkpoint(tmp_path / "lm.pt", str(data_bin)).__enter__()


def test_language_models_continue_and_train_on_a_cpu(toy_text, tmp_path, monkeypatch, capsys):
    """Stock and the plugin under all-ones masks continue a prompt by the same tokens."""
    monkeypatch.setitem(bench.CASES, "continuations to 512", ("translate", 16, 64, 6))
    monkeypatch.setitem(bench.SEARCHES, "continuations to 512", dict(prefix_size=12, max_len_a=0, max_len_b=16))
    monkeypatch.setitem(bench.CASES, "train pages of 512", ("train", 16, 64, 8))
    text = tmp_path / "bin"
    run("fairseq-preprocess", "--only-source", "--trainpref", toy_text / "train.en", "--destdir", text)
    rows, continued = {}, {}
    for system in ("stock", "all-ones"):
        options = dict(system=system, data=str(text), arch="transformer_lm", precision="fp32", device="cpu", repeats=1)
        workload = workloads.LanguageModelWorkload(argparse.Namespace(**options, path=None, profile=True))
        monkeypatch.setattr(workload, "profiled", lambda unit, *_: unit)  # which needs a GPU
        timed = workload.timed

        def kept(work, batches, system=system, timed=timed):
            seconds, hypotheses = timed(work, batches)
            continued.setdefault(system, hypotheses)  # of the first timed work, which is the search
            return seconds, hypotheses

        monkeypatch.setattr(workload, "timed", kept)
        for case in ("continuations to 512", "train pages of 512"):
            kind, page, max_tokens, limit = bench.CASES[case]
            rows[system, case] = getattr(workload, kind)(page, max_tokens, limit, **bench.SEARCHES.get(case, {}))
    assert [row["profile"] for row in rows.values()] == 2 * ["step", "update"]
    assert [row["tokens"] for row in rows.values()] == 2 * [6 * 17, 8 * 16]  # a continuation ends with a symbol
    assert all(torch.equal(continued["all-ones"][n], tokens) for n, tokens in continued["stock"].items())
    for flags, message in (
        (["--cases", "sentences"], "has train pages of 512"),
        (["--systems", "stock", "stock-sdpa"], "--systems stock-sdpa changes cross-attention"),
    ):
        monkeypatch.setattr(sys, "argv", ["bench", str(text), "--device", "cpu", "--arch", "transformer_lm", *flags])
        with pytest.raises(SystemExit):
            bench.main()
        assert message in capsys.readouterr().err


def test_sdpa_everywhere_computes_what_stock_computes(monkeypatch):
    """Two layers on each side: stock training calls SDPA for four self-attention modules, then for six of six."""
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **options: calls.append(1) or real(*args, **options),
    )
    source, target = batch([5, 2, 7], VOCAB, left=True), batch([4, 6, 3], VOCAB, left=False, seed=1)
    model = dense_model(VOCAB).train()
    stock = model(source, None, target)[0]
    assert len(calls) == 4
    workloads.use_sdpa(model)
    torch.testing.assert_close(model(source, None, target)[0], stock, atol=1e-5, rtol=1e-5)
    assert len(calls) == 4 + 6


def test_pages_are_consecutive_sentences_of_the_length_asked_for():
    sentences = [torch.full((length,), k) for k, length in enumerate([3, 4, 2, 5, 1])]
    pages = [page.tolist() for page in workloads.joined(sentences, 6)]
    assert pages == [[0, 0, 0, 1, 1, 1], [2, 2, 3, 3, 3, 3]]


EVENTS = [
    ("cudaLaunchKernel", 0.0, 30),
    ("cudaGraphLaunch", 0.0, 2),
    ("cudaDeviceSynchronize", 0.0, 1),
    ("sm90_xmma_gemm_f16f16_f16", 0.4, 12),
    ("_decode_kernel", 0.2, 6),
    ("void at::native::elementwise_kernel<128, 4, add>", 0.1, 8),
    ("Memcpy DtoD (Device -> Device)", 0.1, 4),
]


def test_a_profile_is_grouped_and_shared_out():
    profile = workloads.summary(EVENTS, wall=1.0, n=2)
    assert profile["gpu_busy"] == pytest.approx(0.8) and profile["wall_seconds"] == 0.5
    assert (profile["kernels"], profile["launches"]) == (15, 16)
    assert profile["groups"] == pytest.approx(
        {"attention": 0.1, "matrix products": 0.2, "copies": 0.05, "elementwise, normalisation": 0.05}
    )
    assert [entry["name"] for entry in profile["top"]][:2] == ["sm90_xmma_gemm_f16f16_f16", "_decode_kernel"]


def test_the_tables_hold_ratios_and_profiles():
    def row(system, speed, memory, **more):
        sizes = dict(peak_bytes=memory, reserved_bytes=2 * memory)
        return dict(case="sentences", system=system, tokens_per_s=speed, seconds=1.0) | sizes | more

    profile = workloads.summary(EVENTS, wall=1.0, n=2) | dict(unit="step")
    rows = [row("stock", 100.0, 2**30), row("all-ones", 450.0, 2**29, cold_seconds=3.0, profile=profile)]
    report = dict(
        device="a GPU", torch="2", triton="3", arch="tiny", precision="fp16", commit="c", command="x", rows=rows
    )
    lines = [" ".join(line.split()) for line in bench.table(report).splitlines()]
    assert "| sentences | all-ones | 450 | 4.50 | 0.50 GiB | 0.50 | 1.00 GiB | 0.50 | 3.0 s, warm 1.0 s |" in lines
    assert "| sentences | all-ones | step | 500.00 | 80% | 15 | 16 | 100.00 | 200.00 | 50.00 | 50.00 |" in lines


def test_rounds_measure_all_systems_in_turns(monkeypatch, tmp_path):
    """Each in a process of its own, whose words are passed over, but not its status."""
    worker = tmp_path / "worker.py"
    worker.write_text("""
import json, sys
system = sys.argv[sys.argv.index("--worker") + 1]
print("words", json.dumps(dict(system=system, case="sentences")), sep="\\n")
sys.exit(3 * (system == "80"))
""")
    monkeypatch.setattr(bench, "__file__", str(worker))
    names = "arch precision repeats device subset limit max_tokens path remove_bpe commit profile"
    unset = dict.fromkeys(names.split())
    options = dict(data="data-bin", systems=["stock", "80"], rivals=[], cases=["sentences"], rounds=2)
    rows = [tuple(row.values()) for row in bench.measure(argparse.Namespace(**options, **unset))]
    died = ("-", "80", "the process ended with status 3")
    assert rows == 2 * [("stock", "sentences"), ("80", "sentences"), died]


def test_a_run_that_is_killed_while_it_writes_leaves_whole_results(monkeypatch, tmp_path):
    """The file was emptied before it was written again: hours of rows were lost."""
    out = tmp_path / "rows.json"

    def killed(path, text, **_):
        with path.open("w") as stream:
            stream.write(text[:9])
        raise KeyboardInterrupt

    def rows(options):
        yield dict(system="stock", case="sentences", seconds=1.0)
        monkeypatch.setattr(Path, "write_text", killed)
        yield dict(system="80", case="sentences", seconds=2.0)

    monkeypatch.setattr(bench, "measure", rows)
    with pytest.raises(KeyboardInterrupt):
        bench.run(argparse.Namespace(device="cpu", precision="fp32", commit="c", out=out), "tiny")
    assert [row["system"] for row in json.loads(out.read_text())["rows"]] == ["stock"]
    assert list(tmp_path.iterdir()) == [out]


def test_the_median_round_counts_and_errors_stay():
    rows = [dict(case="a", system="stock", seconds=seconds, peak_bytes=seconds) for seconds in (3.0, 1.0, 2.0)]
    rows.insert(1, dict(case="-", system="all-ones", error="died"))
    assert bench.median_rows(rows) == [rows[3] | dict(rounds=[3.0, 1.0, 2.0]), rows[1]]


def test_what_cannot_be_done_is_refused():
    command = [sys.executable, ROOT / "scripts/bench_fairseq.py", "data-bin", "--device", "cpu"]
    assert "--profile" in run(*command, "--profile", expect=2)


@pytest.mark.parametrize(
    "words",
    ["bench_fairseq data-bin --device cpu", "bench_commands data-bin --path dense.pt --cpu", "bench_steps"]
    + ["bench_ranks data-bin --path dense.pt --masks masks.safetensors"],
)
def test_results_that_cannot_be_written_are_refused_at_once(words, tmp_path):
    """It was found when the first row was measured, or ended in a traceback."""
    name, *words = words.split()
    gone = tmp_path / "gone"
    output = run(sys.executable, ROOT / f"scripts/{name}.py", *words, "--out", gone / "x.json", expect=2)
    assert f"{name}.py: error: --out: " in output and f"folder {gone} does not exist" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{}/gone"], "gone has no dictionary dict*.txt; name a folder made by fairseq-preprocess"),
        (["{}", "--subset", "foo"], "--subset foo: "),
        (["{}", "--rounds", "0"], "--rounds 0: at least 1 is measured"),
        (["{}", "--limit", "-3"], "--limit -3: at least 1 is measured"),
        (["--table", "{}/gone"], "gone: FileNotFoundError: "),
        (["--table", "{}/dict.de.txt"], "dict.de.txt: JSONDecodeError: "),
        (["--table", "{}/other.json"], "other.json: KeyError: 'rows'; give a file that this program wrote with --out"),
    ],
)
def test_files_and_numbers_that_cannot_be_used_are_named(data_bin, tmp_path, monkeypatch, capsys, flags, message):
    """Each system reported a traceback of its own, or a table of nothing was printed."""
    for file in data_bin.glob("*.de*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "other.json").write_text("{}", "utf-8")
    flags = [flag.format(tmp_path) for flag in flags]
    monkeypatch.setattr(sys, "argv", ["bench_fairseq.py", *flags, "--device", "cpu", "--systems", "stock"])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2 and message in capsys.readouterr().err


# -- rivals -----------------------------------------------------------------------------------------------------------


def test_the_fastest_setting_of_a_rival_counts():
    """Of each setting the median round, of these medians the fastest; the others stay beside it."""
    rows = [
        dict(case="a", system="ctranslate2", seconds=seconds, tokens_per_s=60 / seconds, settings=dict(workers=workers))
        for workers, rounds in ((1, (4.0, 5.0, 1.0)), (4, (3.0, 2.0, 6.0)))
        for seconds in rounds
    ]
    (row,) = bench.median_rows(rows)
    assert row["settings"] == dict(workers=4) and row["seconds"] == 3.0 and row["rounds"] == [3.0, 2.0, 6.0]
    assert row["slower"] == [dict(workers=1, tokens_per_s=15.0)]


def test_settings_of_a_rival(monkeypatch):
    """With random parameters only batches that have one length each; on a CPU all threads in each setting."""
    monkeypatch.setattr(rival.torch, "get_num_threads", lambda: 8)
    variants = functools.partial(rival.variants, workers=[1, 4], batch_tokens=[4096, 16384])
    gpu = variants("cuda", "fp16", trained=False, alone=False)
    assert len(gpu) == 4 and all(settings["compute_type"] == "float16" for _, settings in gpu)
    assert {(settings["workers"], settings["allocator"]) for _, settings in gpu} == {
        (workers, allocator) for workers in (1, 4) for allocator in ("cuda_malloc_async", "cub_caching")
    }
    trained = variants("cuda", "fp16", trained=True, alone=False)
    assert [settings.get("batch_tokens") for _, settings in trained] == [None, 4096, 16384] * 4
    one_by_one = variants("cuda", "fp16", trained=True, alone=True)
    assert [(settings["workers"], "batch_tokens" in settings) for _, settings in one_by_one] == [(1, False)] * 2
    cpu = variants("cpu", "fp32", trained=False, alone=False)
    assert [system for system, _ in cpu] == ["ctranslate2"] * 2 + ["ctranslate2 int8"] * 2
    assert all(settings["workers"] * settings["threads"] == 8 for _, settings in cpu)


def test_bleu_is_of_words():
    """Subwords are joined, and EOS, which a translation has but no word, does not count."""
    vocabulary = dictionary(0)
    subwords = "▁the ▁page ▁is ▁op en ▁and ▁the ▁li st ▁too".split()
    for subword in [*subwords, "▁not"]:
        vocabulary.add_symbol(subword)

    def tokens(words):
        return torch.tensor([*map(vocabulary.index, words), vocabulary.eos()])

    dataset = argparse.Namespace(tgt_dict=vocabulary, tgt=[tokens(subwords), tokens(subwords[:5])])
    workload = workloads.Workload.__new__(workloads.Workload)
    theirs = rival.CTranslate2Workload.__new__(rival.CTranslate2Workload)
    workload.options = theirs.options = argparse.Namespace(remove_bpe="sentencepiece")
    other = [*subwords[:3], "▁not", *subwords[3:]]
    expected = sacrebleu.corpus_bleu(
        ["the page is not open and the list too", "the page is open"],
        [["the page is open and the list too", "the page is open"]],
    ).score
    assert workload.bleu(dataset, {0: tokens(other), 1: tokens(subwords[:5])}) == pytest.approx(expected)
    assert theirs.bleu(dataset, {0: [*other, "</s>"], 1: [*subwords[:5], "</s>"]}) == pytest.approx(expected)
    assert 40 < expected < 90


@pytest.mark.skipif(importlib.util.find_spec("ctranslate2") is not None, reason="ctranslate2 is installed")
def test_a_rival_that_is_not_installed_is_named():
    command = [sys.executable, ROOT / "scripts/bench_fairseq.py", "data-bin", "--device", "cpu"]
    assert "pip install ctranslate2" in run(*command, "--rivals", "ctranslate2", expect=2)


def test_ctranslate2_takes_as_many_steps(data_bin, tmp_path):
    """Translations of random parameters end at one length; but a sample may end early, in either."""
    pytest.importorskip("ctranslate2", reason="pip install ctranslate2")
    out = tmp_path / "rows.json"
    cases = ["sentences", "sentences, one by one", "sentences, prefixes of 5", "sentences, alignments"]
    run(
        *[sys.executable, ROOT / "scripts/bench_fairseq.py", data_bin, "--device", "cpu", "--limit", 6, "--out", out],
        *["--arch", "transformer_tiny", "--rounds", 1, "--systems", "all-ones", "--rivals", "ctranslate2"],
        *["--cases", *cases],
    )
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert sorted({row["system"] for row in rows}) == ["all-ones", "ctranslate2", "ctranslate2 int8"]
    for case in cases:
        assert len({row["tokens"] for row in rows if row["case"] == case}) == 1
    assert all("settings" in row for row in rows if row["system"] != "all-ones")
