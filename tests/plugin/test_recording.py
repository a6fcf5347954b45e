"""Recorded statistics are what one would compute by hand, sentence by sentence."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin.builders import batch, dense_model, dictionary
from plugin.commands import ROOT, changed_checkpoint, run, run_process

from ap_fairseq.artifacts import AttentionStats
from ap_fairseq.cli import record as record_command
from ap_fairseq.files import ArtifactError, UserError
from ap_fairseq.lengths import support_of
from ap_fairseq.model.checkpoints import load_checkpoint
from ap_fairseq.recording.lengths import sample_by_length
from ap_fairseq.recording.recorder import AttentionRecorder
from ap_fairseq.sites import AttentionKind, attention_sites

VOCAB = dictionary()
PAD = VOCAB.pad()
SOURCE_LENGTHS, TARGET_LENGTHS = (5, 3, 1, 7), (4, 6, 2, 3)


def decoder_input(lengths, seed):
    rows = batch(lengths, VOCAB, left=False, seed=seed)
    rows[:, 0] = VOCAB.eos()  # row 0 is the leading EOS
    return rows


def record(model, groups, max_positions=(20, 20)) -> AttentionStats:
    """Record the sentences of each group as one batch."""
    source, target = batch(SOURCE_LENGTHS, VOCAB, False, 1), decoder_input(TARGET_LENGTHS, 2)
    with AttentionRecorder(model, max_positions) as recorder, torch.no_grad():
        for group in groups:
            src = source[group][:, : max(SOURCE_LENGTHS[k] for k in group)]
            tgt = target[group][:, : max(TARGET_LENGTHS[k] for k in group)]
            recorder.begin(src, tgt, PAD)
            model(src_tokens=src, src_lengths=src.ne(PAD).sum(1), prev_output_tokens=tgt)
    return recorder.finish()


def by_hand(model) -> AttentionStats:
    """Compute softmax(q k / sqrt(D)) from the inputs of every module, one unpadded sentence at a time."""
    inputs = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, site=site: inputs.__setitem__(site, (module, kwargs["query"], kwargs["key"])),
            with_kwargs=True,
        )
        for site, module in attention_sites(model)
    ]
    longest = {"q": max(TARGET_LENGTHS), "k": max(SOURCE_LENGTHS)}
    shapes = {
        AttentionKind.ENCODER_SELF: (longest["k"], longest["k"]),
        AttentionKind.DECODER_SELF: (longest["q"], longest["q"]),
        AttentionKind.CROSS: (longest["q"], longest["k"]),
    }
    mass = {kind: np.zeros((2, 2, *shape)) for kind, shape in shapes.items()}
    support = {kind: np.zeros(shape, dtype=np.int64) for kind, shape in shapes.items()}
    end_mass = {kind: np.zeros((2, 2)) for kind in (AttentionKind.ENCODER_SELF, AttentionKind.CROSS)}
    source, target = batch(SOURCE_LENGTHS, VOCAB, False, 1), decoder_input(TARGET_LENGTHS, 2)
    for k in range(len(source)):
        src, tgt = source[k : k + 1, : SOURCE_LENGTHS[k]], target[k : k + 1, : TARGET_LENGTHS[k]]
        with torch.no_grad():
            model(src_tokens=src, src_lengths=torch.tensor([SOURCE_LENGTHS[k]]), prev_output_tokens=tgt)
        for (kind, layer), (module, query, key) in inputs.items():
            for head in range(module.num_heads):
                part = slice(head * module.head_dim, (head + 1) * module.head_dim)
                q = module.q_proj(query)[:, 0, part].detach().double()
                scores = q @ module.k_proj(key)[:, 0, part].detach().double().T / module.head_dim**0.5
                if kind.causal:
                    scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
                weights = scores.softmax(-1).numpy()
                mass[kind][layer, head, : scores.size(0), : scores.size(1)] += weights
                if kind in end_mass:
                    end_mass[kind][layer, head] += weights[:, -1].sum()
            cells = np.ones((query.size(0), key.size(0)), dtype=np.int64)
            if layer == 0:
                support[kind][: query.size(0), : key.size(0)] += np.tril(cells) if kind.causal else cells
    for hook in hooks:
        hook.remove()
    return AttentionStats(mass, support, {}, end_mass)


def assert_same(ours: AttentionStats, expected: AttentionStats, tolerance=2e-6):
    for kind in AttentionKind:
        np.testing.assert_array_equal(ours.support[kind], expected.support[kind])
        np.testing.assert_allclose(ours.mass[kind], expected.mass[kind], atol=tolerance)
    assert ours.end_mass.keys() == expected.end_mass.keys() == {AttentionKind.ENCODER_SELF, AttentionKind.CROSS}
    for kind, on_end in expected.end_mass.items():
        np.testing.assert_allclose(ours.end_mass[kind], on_end, atol=tolerance)


@pytest.mark.parametrize("groups", [[[0, 1, 2, 3]], [[0], [1, 2], [3]], [[3, 0], [2, 1]]])
def test_statistics_equal_a_hand_computed_sum_however_sentences_are_batched(groups):
    """Padded queries carry full probability mass in stock fairseq; they, and padded keys, must not count."""
    model = dense_model(VOCAB)
    expected = by_hand(model)
    assert_same(record(model, groups), expected)
    assert all(expected.mass[kind].sum() > 0 for kind in AttentionKind)


def test_every_observed_row_sums_to_its_number_of_sentences():
    stats = record(dense_model(VOCAB), [[0, 1, 2, 3]])
    for kind in AttentionKind:
        sentences = stats.support[kind].max(-1)
        np.testing.assert_allclose(
            stats.mass[kind].sum(-1), np.broadcast_to(sentences, stats.mass[kind].shape[:3]), rtol=1e-6
        )


def test_a_merge_of_two_recordings_equals_one_recording():
    model = dense_model(VOCAB)
    merged, whole = record(model, [[0, 2]]).merge(record(model, [[1], [3]])), record(model, [[0, 1, 2, 3]])
    assert_same(merged, whole)
    for key in ("sentences", "pairs_recorded", "pairs_beyond_range"):
        assert merged.metadata[key] == whole.metadata[key]


def test_recordings_cut_at_different_positions_do_not_merge():
    """A cell between the two limits would be counted in one of them only."""
    one, other = record(dense_model(VOCAB), [[0]]), record(dense_model(VOCAB), [[1]])
    one.metadata["max_positions"], other.metadata["max_positions"] = 1024, 512
    assert one.merge(other).metadata["sentences"] == 2  # nothing is beyond either
    other.metadata["pairs_beyond_range"]["cross"] = 7
    with pytest.raises(ArtifactError, match="different max_positions: 1024 and 512"):
        one.merge(other)


def test_recordings_of_different_checkpoints_do_not_merge():
    one, other = record(dense_model(VOCAB), [[0]]), record(dense_model(VOCAB), [[1]])
    one.metadata["checkpoint"], other.metadata["checkpoint"] = "aaa", "bbb"
    with pytest.raises(ArtifactError, match="different checkpoint: aaa and bbb"):
        one.merge(other)


def test_dropout_is_not_recorded():
    """The authors' code recorded after attention dropout and with dropout on; here it must change nothing."""
    model = dense_model(VOCAB)
    expected = record(model, [[0, 1, 2, 3]])
    for _, module in attention_sites(model):
        module.dropout_module.p = 0.5
        module.dropout_module.train()
    recorded = record(model, [[0, 1, 2, 3]])
    np.testing.assert_array_equal(
        recorded.mass[AttentionKind.ENCODER_SELF][0], expected.mass[AttentionKind.ENCODER_SELF][0]
    )


def test_cells_beyond_the_limit_are_counted():
    stats = record(dense_model(VOCAB), [[0, 1, 2, 3]], max_positions=(4, 3))
    full = record(dense_model(VOCAB), [[0, 1, 2, 3]])
    for kind in AttentionKind:
        n_queries, n_keys = stats.support[kind].shape
        np.testing.assert_array_equal(stats.mass[kind], full.mass[kind][:, :, :n_queries, :n_keys])
        beyond = full.support[kind].sum() - stats.support[kind].sum()
        assert stats.metadata["pairs_beyond_range"][kind.value] == beyond > 0


def test_mass_on_the_last_source_token_counts_within_the_limit():
    """Of the last tokens, only those below the limit of 3 source positions: sentences 1 and 2."""
    model = dense_model(VOCAB)
    stats, short = record(model, [[0, 1, 2, 3]], max_positions=(3, 6)), record(model, [[1, 2]])
    assert stats.end_mass.keys() == {AttentionKind.ENCODER_SELF, AttentionKind.CROSS}
    for kind, on_end in stats.end_mass.items():
        np.testing.assert_allclose(on_end, short.end_mass[kind], atol=2e-6)
        assert (on_end <= stats.mass[kind].sum((2, 3))).all()


def test_left_padded_batches_are_refused():
    recorder = AttentionRecorder(dense_model(VOCAB), (20, 20))
    with pytest.raises(ValueError, match="source batch is padded on the left"):
        recorder.begin(batch([2, 4], VOCAB, left=True), decoder_input([2, 4], 0), PAD)


def test_an_empty_recording_is_an_error():
    with pytest.raises(UserError, match="no sentence was recorded"):
        AttentionRecorder(dense_model(VOCAB), (20, 20)).finish()


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7)), min_size=1, max_size=8))
def test_support_counts_the_sentences_of_each_cell(pairs):
    lengths = np.array([[*pair, pairs.count(pair)] for pair in set(pairs)])
    longest_target, longest_source = (max(pair[side] for pair in pairs) for side in (0, 1))
    exists = {
        AttentionKind.ENCODER_SELF: (longest_source, longest_source, lambda i, j, t, s: i < s and j < s),
        AttentionKind.DECODER_SELF: (longest_target, longest_target, lambda i, j, t, s: i < t and j <= i),
        AttentionKind.CROSS: (longest_target, longest_source, lambda i, j, t, s: i < t and j < s),
    }
    for kind, (n_queries, n_keys, attendable) in exists.items():
        expected = [[sum(attendable(i, j, *pair) for pair in pairs) for j in range(n_keys)] for i in range(n_queries)]
        np.testing.assert_array_equal(support_of(kind, lengths), expected)


def test_a_sample_has_the_lengths_of_the_whole():
    """One of each run of neighbours in length: seeded, without repetition, in order; too large a sample is all."""
    lengths = np.sort(np.random.default_rng(0).lognormal(3, 0.6, 10_000).astype(int))
    indices = np.arange(20_000, 30_000)
    sample = sample_by_length(indices, 500, seed=1)
    assert len(np.unique(sample)) == 500 and (np.diff(sample) > 0).all()
    np.testing.assert_array_equal(sample, sample_by_length(indices, 500, seed=1))
    assert (sample != sample_by_length(indices, 500, seed=2)).mean() > 0.9
    whole, drawn = (np.quantile(x, [0.02, 0.25, 0.5, 0.75, 0.98]) for x in (lengths, lengths[sample - 20_000]))
    np.testing.assert_allclose(drawn, whole, rtol=0.05)
    np.testing.assert_array_equal(sample_by_length(indices, 10_000, seed=1), indices)
    np.testing.assert_array_equal(sample_by_length(indices, 99_999, seed=1), indices)


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """A limit on the size of files stands for a full disk: one error with both sizes, and no half file."""
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "import numpy as np\n"
        "from ap_fairseq.artifacts import AttentionStats\n"
        "from ap_fairseq.files import ArtifactError\n"
        "from ap_fairseq.sites import AttentionKind\n"
        "kind, n = AttentionKind.CROSS, np.ones((60, 60), dtype=np.int64)\n"
        "try:\n"
        f"    AttentionStats({{kind: np.zeros((2, 2, 60, 60))}}, {{kind: n}}).save({str(tmp_path / 'stats')!r})\n"
        "except ArtifactError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path]))}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"stats could not be written: .*; it needs [\d,]+ bytes; [\d,]+ bytes are free", done.stdout)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_recording_leaves_nothing_and_runs_again(data_bin, dense, tmp_path):
    """SIGTERM after the first batches, as a queue sends it: no file, whole or half; the next run is complete."""
    command = ["ap-record", data_bin, "--path", dense, "-o", tmp_path / "stats", "--cpu", "--num-workers", 0]
    slow = [str(Path(sys.executable).parent / command[0]), *map(str, command[1:]), "--batch-size", "1"]
    slow += ["--log-format", "simple", "--log-interval", "1"]
    with subprocess.Popen(slow, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as recording:
        for line in recording.stdout:
            if "valid on 'train' subset:" in line:
                break
        recording.terminate()
    assert recording.returncode != 0 and not list(tmp_path.iterdir())
    run(*command, "--max-tokens", 2000)
    assert AttentionStats.load(tmp_path / "stats").metadata["sentences"] == 1000


@pytest.mark.parametrize("log_format", ["simple", "json"])
def test_a_recording_of_few_batches_reports_its_progress(log_format, data_bin, dense, tmp_path):
    """fairseq's interval of 100 batches said nothing until the end of most recordings, and JSON lines were empty."""
    command = ["ap-record", data_bin, "--path", dense, "--cpu", "--num-workers", 0, "--max-tokens", 400]
    log = run(*command, "-o", tmp_path / "a", "--log-format", log_format)
    shares = [int(share) for share in re.findall(r'recorded(?:=|": ")(\d+)%', log)]
    assert 8 <= len(shares) <= 20 and shares == sorted(set(shares)) and shares[-1] >= 80
    log = run(*command, "-o", tmp_path / "b", "--log-format", log_format, "--log-interval", 1000)
    assert "recorded=" not in log and '"recorded"' not in log


@pytest.fixture
def other_data_bin(data_bin, tmp_path):
    """The toy corpus under a dictionary of the same size in another order, which fits the model all the same."""
    folder = tmp_path / "other-bin"
    shutil.copytree(data_bin, folder)
    for side in ("en", "de"):
        lines = (folder / f"dict.{side}.txt").read_text("utf-8").splitlines(keepends=True)
        (folder / f"dict.{side}.txt").write_text("".join(reversed(lines)), "utf-8")
    return folder


def test_what_cannot_be_recorded_is_refused_at_once(data_bin, other_data_bin, dense, tmp_path, capsys):
    """Some of these ended in tracebacks or, as --valid-subset and --num-shards, silently recorded something else.

    A model whose attention is finite, but not its loss, was recorded, too.
    """

    def forget_data(state):
        state["cfg"]["task"]["data"] = "gone"

    def other_architecture(state):
        state["cfg"]["model"].arch = state["cfg"]["model"]._name = "lstm"

    larger = tmp_path / "larger-bin"
    shutil.copytree(data_bin, larger)
    for side in ("en", "de"):
        with (larger / f"dict.{side}.txt").open("a") as dictionary:
            dictionary.write("newword 1\n")

    def diverge(state):
        state["model"]["encoder.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")

    def diverge_after_attention(state):
        state["model"]["decoder.layers.1.fc1.weight"][0, 0] = float("inf")

    diverged = changed_checkpoint(dense, tmp_path / "diverged.pt", diverge)
    silent = changed_checkpoint(dense, tmp_path / "silent.pt", diverge_after_attention)
    no_counts, no_index, no_text, no_utf8 = (tmp_path / f"no-{part}" for part in ("counts", "index", "text", "utf8"))
    for folder in (no_counts, no_index, no_text, no_utf8):
        shutil.copytree(data_bin, folder)
    (no_counts / "dict.en.txt").write_text("a b c\n")
    (no_index / "valid.en-de.en.idx").write_bytes(b"x" * 50)
    (no_text / "valid.en-de.en.bin").write_bytes(b"x" * 10)
    (no_utf8 / "dict.en.txt").write_bytes(b"\xff 1\n")
    colon = tmp_path / "with:colon"
    colon.symlink_to(data_bin)
    source_only = tmp_path / "source-only"
    shutil.copytree(data_bin, source_only)
    for file in source_only.glob("test.en-de.de.*"):
        file.unlink()
    (source_only / "valid.en-de.en.bin").write_bytes(b"")  # as fairseq-preprocess writes it for an empty text
    moved = changed_checkpoint(dense, tmp_path / "moved.pt", forget_data)
    lstm = changed_checkpoint(dense, tmp_path / "lstm.pt", other_architecture)
    cases = [
        (
            [other_data_bin, "--path", dense],
            r"dict.de.txt has the SHA-256 [0-9a-f]{12}; .* was trained with .*, which has",
        ),
        ([larger, "--path", moved], r"moved.pt has \d+ symbols in its encoder, the dictionary of .*larger-bin has \d+"),
        ([data_bin, "--path", lstm], "architecture 'lstm'; attention can be recorded from .*transformer_iwslt_de_en"),
        ([tmp_path, "--path", dense], "has no dictionary"),
        ([data_bin, "--path", dense, "--subset", "dev"], "no subset 'dev' in"),
        ([data_bin, "--path", dense, "--subset", "valid,test"], "names several subsets; record each into a file"),
        (
            ["--max-tokens", "500", data_bin, "--path", dense],
            "data folder 500 does not exist;.* before fairseq's flags",
        ),
        ([data_bin, "--path", dense, "--sample", 0], "--sample must be at least 1 sentence, got 0"),
        ([f"{data_bin}:{data_bin}", "--path", dense], "names 2 shards; record each into a file of its own"),
        (
            [data_bin, "--path", dense, "--max-tokens", 6],
            r"--max-tokens 6: a sentence of subset 'train' has \d+ tokens",
        ),
        ([source_only, "--path", dense, "--subset", "test"], r"has no target side \(de\).*without --only-source"),
        ([source_only, "--path", dense, "--subset", "valid"], "subset 'valid' of .* has no sentences"),
        (
            [data_bin, "--path", diverged],
            "encoder_self layer 0 head 0: the attention mass is nan .*in fp32 .*or with --bf16",
        ),
        ([data_bin, "--path", silent], "the loss of .*silent.pt on subset 'train' is nan.*or with --bf16"),
        ([no_counts, "--path", moved], "no-counts/dict.en.txt is damaged: Incorrect dictionary format"),
        ([no_index, "--path", dense, "--subset", "valid"], "valid.en-de.en.idx is damaged: it does not begin as"),
        ([no_text, "--path", dense, "--subset", "valid"], r"valid.en-de.en.bin has 10 bytes, its index says [\d,]+: "),
        ([no_utf8, "--path", moved], "no-utf8/dict.en.txt is damaged: Incorrect encoding detected"),
        ([colon, "--path", dense], "with:colon: fairseq splits paths at ':'; rename or link the folder"),
        ([data_bin, "--path", dense, "--valid-subset", "test"], "--valid-subset has no effect .* with --subset"),
        ([data_bin, "--path", dense, "--num-shards=2"], "--num-shards has no effect on ap-record; .*--sample N"),
        (
            [data_bin, "--path", dense, "--distributed-world-size", torch.cuda.device_count() + 2],
            r"--distributed-world-size \d+: world size is \d+ but have \d+ available.* with torchrun",
        ),
        ([data_bin, "--path", diverged, "--importance"], "gradients of a loss of nan are not finite.*or with --bf16"),
        ([data_bin, "--path", dense, "--user-dir", tmp_path / "gone"], "--user-dir .*gone: there is no such folder"),
        ([data_bin, "--path", dense, "--model-overrides", "{"], "--model-overrides '{' is not a Python dictionary"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit) as stop:
            record_command.main([*map(str, arguments), "--cpu", "-o", str(tmp_path / "stats")])
        printed = capsys.readouterr().err
        assert stop.value.code == 2 and re.search(message, printed), f"{arguments}: {printed[-800:]}"
        assert not (tmp_path / "stats").exists()


def test_flags_of_fairseq_win_in_either_spelling(data_bin, dense, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(record_command.distributed_utils, "call_main", lambda cfg, *_, **__: seen.append(cfg.dataset))
    for flags in ([], ["--max-tokens=500"], ["--batch-size=4", "--required-batch-size-multiple=2"]):
        record_command.main([str(data_bin), "--path", str(dense), "-o", str(tmp_path / "stats"), "--cpu", *flags])
    assert [(cfg.max_tokens, cfg.batch_size, cfg.required_batch_size_multiple) for cfg in seen] == [
        (12000, None, 1),
        (500, None, 1),
        (None, 4, 2),
    ]


def test_sentences_longer_than_the_model_takes_are_left_out(data_bin, dense, tmp_path, capfd):
    flags = ["--model-overrides", "{'max_source_positions': 12}", "--subset", "valid", "--cpu", "--num-workers", 0]
    run("ap-record", data_bin, "--path", dense, "-o", tmp_path / "all", *flags[2:])
    printed = run("ap-record", data_bin, "--path", dense, "-o", tmp_path / "short", *flags)
    every, short = (AttentionStats.load(tmp_path / name) for name in ("all", "short"))
    left_out = every.metadata["sentences"] - short.metadata["sentences"]
    assert left_out > 0 and short.support[AttentionKind.ENCODER_SELF].shape[-1] <= 12
    assert f"{left_out} sentences were not recorded: longer than the model's positions" in printed


def test_half_precision_is_asked_for_by_either_flag(data_bin, dense, tmp_path):
    """--bf16, the remedy for what overflows in fp16, was ignored: fairseq-validate has no such mode."""
    recorded = {}
    for flags in ([], ["--fp16"], ["--bf16"]):
        output = tmp_path / f"stats{''.join(flags)}"
        command = [str(data_bin), "--path", str(dense), "-o", str(output), "--cpu", "--num-workers", "0", *flags]
        record_command.main([*command, "--subset", "valid", "--max-tokens", "500"])
        recorded[tuple(flags)] = AttentionStats.load(output).mass[AttentionKind.CROSS]
    exact, fp16, bf16 = recorded.values()
    assert 0 < abs(fp16 - exact).max() < abs(bf16 - exact).max() < 1


def test_what_is_left_out_is_said(data_bin, dense, tmp_path, capfd):
    """Fairseq trains on train1 beside train, and evaluates the average of --store-ema; neither is recorded silently."""
    folder = tmp_path / "bin"
    shutil.copytree(data_bin, folder)
    for file in data_bin.glob("valid.en-de.*"):
        shutil.copy(file, folder / file.name.replace("valid", "test1"))
    averaged = changed_checkpoint(dense, tmp_path / "ema.pt", lambda state: state["extra_state"].update(ema={}))
    command = [str(folder), "--path", str(averaged), "-o", str(tmp_path / "stats"), "--cpu", "--num-workers", "0"]
    record_command.main([*command, "--subset", "test"])
    printed = "".join(capfd.readouterr())
    assert "'test' alone is recorded, not test1 beside it" in printed and "also holds averaged parameters" in printed
    assert AttentionStats.load(tmp_path / "stats").metadata["sentences"] == 220


def test_batch_buckets_of_the_training_are_only_padding(data_bin, dense, tmp_path):
    """--num-batch-buckets counted padding as length, and stock fairseq fails with it under numpy 2.4."""
    bucketed = changed_checkpoint(dense, tmp_path / "b.pt", lambda s: s["cfg"]["task"].update(num_batch_buckets=3))
    for path in (dense, bucketed):
        command = [str(data_bin), "--path", str(path), "-o", str(tmp_path / path.stem), "--cpu", "--num-workers", "0"]
        record_command.main([*command, "--subset", "valid"])
    plain, found = (AttentionStats.load(tmp_path / path.stem) for path in (dense, bucketed))
    for kind in AttentionKind:
        np.testing.assert_array_equal(plain.support[kind], found.support[kind])
        np.testing.assert_allclose(plain.mass[kind], found.mass[kind], atol=1e-6)


def test_architectures_of_a_user_record_and_apply(data_bin, dense, masks_file, tmp_path):
    """They were refused by name before the --user-dir that registers them was imported."""
    plugin = tmp_path / "sizes_of_mine"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(
        "import ap_fairseq.plugin\n"
        "from fairseq.models import register_model_architecture\n"
        "from fairseq.models.transformer import base_architecture\n"
        "for model in ('transformer', 'pruned_transformer'):\n"
        "    register_model_architecture(model, f'my_{model}')(lambda args: base_architecture(args))\n"
    )

    def rename(state):
        state["cfg"]["model"].arch = state["cfg"]["model"]._name = "my_transformer"

    mine = changed_checkpoint(dense, tmp_path / "mine.pt", rename)
    record = ["ap-record", data_bin, "--path", mine, "-o", tmp_path / "stats", "--cpu", "--subset", "valid"]
    assert "needs the --user-dir that registers it" in run(*record, expect=2)
    run(*record, "--user-dir", plugin, "--num-workers", 0)
    apply = ["ap-apply", mine, "--attention-masks", masks_file, "--data", data_bin, "-o", tmp_path / "pruned.pt"]
    told = "'my_transformer' is not registered here; it has the options of fairseq's transformer"
    assert told in run(*apply)  # the checkpoint has all sizes, and its parameters must agree
    assert told not in run(*apply, "--user-dir", plugin, "--overwrite")

    def rename_pruned(state):
        state["cfg"]["model"]["_name"] = "my_pruned_transformer"

    pruned = changed_checkpoint(tmp_path / "pruned.pt", tmp_path / "mine-pruned.pt", rename_pruned)
    apply[1], apply[-1] = pruned, tmp_path / "again.pt"
    run(*apply, "--user-dir", plugin)
    assert load_checkpoint(tmp_path / "again.pt")["cfg"]["model"]["_name"] == "pruned_transformer"


@pytest.mark.parametrize("spelling", ["absolute", "link", "name"])
def test_user_dir_may_name_this_package_again(data_bin, dense, tmp_path, spelling):
    """Under another path, or as the bare name that fairseq looks up beside itself, it is "not globally unique"."""
    (tmp_path / "ap_fairseq").symlink_to(ROOT / "ap_fairseq")
    user_dir = {"absolute": ROOT / "ap_fairseq", "link": tmp_path / "ap_fairseq", "name": "ap_fairseq"}[spelling]
    command = ["ap-record", data_bin, "--path", dense, "-o", tmp_path / "stats", "--cpu", "--subset", "valid"]
    run_process(*command, "--user-dir", user_dir, "--num-workers", 0, "--user-dir", user_dir, cwd="/")


def test_importance_without_cross_attention_counts_nothing_in_the_encoder():
    """The loss does not depend on an encoder that the decoder does not read: torch refused to differentiate by it."""
    model = dense_model(VOCAB, no_cross_attention=True)
    source, target = batch(SOURCE_LENGTHS, VOCAB, False, 1), decoder_input(TARGET_LENGTHS, 2)
    with AttentionRecorder(model, (20, 20), importance=True) as recorder:
        recorder.begin(source, target, PAD)
        output = model(src_tokens=source, src_lengths=source.ne(PAD).sum(1), prev_output_tokens=target)[0]
        recorder.add_importance(output.logsumexp(-1).sum())
    stats = recorder.finish()
    assert stats.kinds == [AttentionKind.ENCODER_SELF, AttentionKind.DECODER_SELF]
    assert not stats.importance[AttentionKind.ENCODER_SELF].any()
    assert stats.importance[AttentionKind.DECODER_SELF].any()
