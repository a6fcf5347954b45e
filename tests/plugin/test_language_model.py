"""Language models: one stack of causal self-attention under masks, through fairseq's own commands."""

import argparse
import copy
import re

import numpy as np
import pytest
import torch
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.models.transformer_lm import TransformerLanguageModel
from omegaconf import OmegaConf
from plugin.builders import (
    LM_SIZES,
    adaptive,
    batch,
    causal_masks,
    dictionary,
    language_models,
    random_masks,
    random_stats,
)
from plugin.commands import PLUGIN, assert_reads_as_stock, losses, run, train_on_text
from plugin.searches import DEVICE

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.cli import record
from ap_fairseq.files import ArtifactError, UserError
from ap_fairseq.model.checkpoints import load_checkpoint
from ap_fairseq.model.config import PrunedLanguageModelConfig
from ap_fairseq.model.language_model import SCALES, PrunedLanguageModel
from ap_fairseq.model.stock import convert_to_stock
from ap_fairseq.model.training_graphs import TrainingGraphs
from ap_fairseq.provenance import decode_provenance
from ap_fairseq.pruning.build import build_masks
from ap_fairseq.pruning.flags import parse_mask_flags, spec_from
from ap_fairseq.sites import AttentionKind, architecture

KIND = AttentionKind.DECODER_SELF
VOCAB = dictionary(40)
LENGTHS = [12, 5, 9]

BAEVSKI = dict(**adaptive("10,25"), no_decoder_final_norm=True)


def task(vocab=VOCAB):
    return argparse.Namespace(cfg=None, source_dictionary=vocab, target_dictionary=vocab)


def pruned(sparsity: float = 0.5, **options) -> PrunedLanguageModel:
    _, model = language_models(VOCAB, **options)
    model.set_masks(causal_masks(sparsity))
    return model.double()


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decoder_normalize_before": True, "decoder_learned_pos": True, "share_decoder_input_output_embed": True},
        {"decoder_input_dim": 8, "no_token_positional_embeddings": True, "activation_fn": "gelu"},
        BAEVSKI,
    ],
    ids=["plain", "gpt", "projected", "baevski"],
)
def test_all_ones_masks_give_the_losses_and_gradients_of_fairseq(options):
    stock, ours = (model.double().train() for model in language_models(VOCAB, **options))
    assert {name for name, _ in stock.named_parameters()} == {name for name, _ in ours.named_parameters()}
    tokens, target = batch(LENGTHS, VOCAB, left=False), batch(LENGTHS, VOCAB, left=False, seed=1)
    losses = []
    for model in (stock, ours):
        sample = {"net_input": {"src_tokens": tokens}, "target": target, "ntokens": sum(LENGTHS)}
        if model.decoder.adaptive_softmax is not None:
            criterion = AdaptiveLoss(argparse.Namespace(target_dictionary=VOCAB), sentence_avg=False)
            losses.append(criterion(model, sample)[0])
        else:
            logits, _ = model(tokens)
            losses.append(torch.nn.functional.cross_entropy(logits.mT, target, ignore_index=VOCAB.pad()))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    expected = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-9, atol=1e-12, msg=name)


def test_options_that_fairseq_loses_are_lost_here_too(caplog):
    """Its decoder looks for them in a Namespace, and fairseq-train has none: checkpoints of one did not load as the
    other."""
    options = {**LM_SIZES, **dict.fromkeys(SCALES, True)}
    cfg = OmegaConf.structured(PrunedLanguageModelConfig(**options, attention_masks="none"))
    stock, ours = (
        model.build_model(copy.deepcopy(cfg), task()) for model in (TransformerLanguageModel, PrunedLanguageModel)
    )
    assert {name for name, _ in stock.named_parameters()} == {name for name, _ in ours.named_parameters()}
    assert "--scale-fc has no effect" in caplog.text


def test_a_token_depends_on_the_tokens_that_its_row_keeps():
    """In one layer, the derivatives of a row by the tokens that no head keeps are exactly 0."""
    model = pruned(0.6)
    layer = model.decoder.layers[0]
    x = torch.randn(12, 1, 16, dtype=torch.float64, requires_grad=True)
    output, *_ = layer(x, self_attn_mask=x.new_empty(0))
    keep = causal_masks(0.6).keep[KIND][0].any(0)
    for row in range(12):
        (gradient,) = torch.autograd.grad(output[row].square().sum(), x, retain_graph=True)
        assert (gradient[:, 0].abs().sum(1) > 0).tolist() == keep[row, :12].tolist(), row


@pytest.mark.parametrize("kernels", ["torch", "small", "block-sparse"])
@pytest.mark.parametrize(
    "flags",
    [
        "--criterion importance --smooth 4",
        "--criterion importance --granularity 8",
        "--criterion importance --granularity diagonal",
        "--criterion window --extrapolate keep",
        "--criterion percentile",
    ],
)
def test_later_tokens_change_no_earlier_logit(flags, kernels, monkeypatch):
    """A leak would make pruned models look better than dense ones. The last rows lie beyond those of the masks."""
    if kernels == "block-sparse":
        monkeypatch.setattr("triton_ops.small.SMALL_TILES", ())  # those of longer blocks
    stats = random_stats(longest=(16, 16))
    built = build_masks(stats, spec_from(parse_mask_flags(["--decoder-self", "0.7", *flags.split()]), stats)).masks
    sizes = dict(decoder_embed_dim=32, decoder_input_dim=32, decoder_output_dim=32, tokens_per_sample=40)
    backend = "sdpa" if kernels == "torch" else "triton"
    _, model = language_models(VOCAB, attention_backend=backend, **sizes)
    model.set_masks(PruningMasks({KIND: built.keep[KIND]}, {KIND: built.extrapolation[KIND]}))
    model.to(DEVICE)
    tokens, others = (batch([40], VOCAB, left=False, seed=seed).to(DEVICE) for seed in (0, 1))
    cuts = (1, 8, 15, 16, 17, 32, 38)
    changed = torch.cat([torch.cat([tokens[:, :cut], others[:, cut:]], 1) for cut in cuts])
    for training in (False, True):
        logits, other_logits = (model.train(training)(rows)[0] for rows in (tokens.expand_as(changed), changed))
        for cut, before, after in zip(cuts, logits, other_logits, strict=True):
            assert torch.equal(after[:cut], before[:cut]), (training, cut)
            assert not torch.equal(after[cut], before[cut])


def test_decoding_step_by_step_is_the_full_pass():
    """The row of a step is its number, though keys that no later row keeps have left the cache by then."""
    model = pruned(0.7)
    tokens = batch([14, 14, 14], VOCAB, left=False)
    whole, _ = model(tokens)
    state: dict = {}
    steps = [model.decoder(tokens[:, : n + 1], incremental_state=state)[0] for n in range(tokens.size(1))]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-11, atol=1e-13)


def test_replayed_updates_are_direct_ones():
    model = pruned().train()
    plain = copy.deepcopy(model)
    model._graphs = TrainingGraphs(model, capture=False)
    tokens, target = batch(LENGTHS, VOCAB, left=False), batch(LENGTHS, VOCAB, left=False, seed=1)
    for part in (model, plain):
        logits, _ = part(tokens, src_lengths=torch.tensor(LENGTHS))
        torch.nn.functional.cross_entropy(logits.mT, target, ignore_index=VOCAB.pad()).backward()
    assert model._graphs.graphs
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-9, atol=1e-12, msg=name)


def test_masks_of_another_model_are_refused(tmp_path):
    random_masks(0.5).save(tmp_path / "translation.safetensors")
    cfg = PrunedLanguageModelConfig(**LM_SIZES, attention_masks=str(tmp_path / "translation.safetensors"))
    with pytest.raises(UserError, match="encoder_self 2 layers x 2 heads.*the model has decoder_self 2 layers x 2"):
        PrunedLanguageModel.build_model(cfg, task())
    with pytest.raises(UserError, match="--base-layers 1"):
        PrunedLanguageModel.build_model(PrunedLanguageModelConfig(**LM_SIZES, base_layers=1), task())


# -- fairseq's commands -----------------------------------------------------------------------------------------------

BLOCK = 24
TEXT = ["--sample-break-mode", "none", "--tokens-per-sample", BLOCK]
TINY = [
    *("--decoder-layers 2 --decoder-embed-dim 32 --decoder-input-dim 32 --decoder-output-dim 32").split(),
    *("--decoder-ffn-embed-dim 64 --decoder-attention-heads 2 --share-decoder-input-output-embed").split(),
]


def train(data, save_dir, *flags, arch="transformer_lm", task="language_modeling", updates=40, expect=0) -> str:
    own = ["--task", task, "--arch", arch, *TINY, *TEXT, *flags]
    return train_on_text(data, save_dir, *own, updates=updates, expect=expect)


def evaluate(data, path, *flags) -> tuple[str, str]:
    """Loss and perplexity of fairseq-eval-lm."""
    log = run(
        *["fairseq-eval-lm", data, *PLUGIN, "--path", path, "--gen-subset", "test", *TEXT, "--cpu"],
        *["--num-workers", 0, *flags],
    )
    return re.search(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)", log).groups()


def continuations(data, path, *flags) -> list[str]:
    """What fairseq-generate makes of the first two words of test sentences."""
    log = run(
        *["fairseq-generate", data, *PLUGIN, "--task", "language_modeling", "--path", path, "--gen-subset", "test"],
        *["--sample-break-mode", "eos", "--tokens-per-sample", BLOCK, "--cpu", "--batch-size", 16, "--prefix-size", 2],
        *["--required-batch-size-multiple", 1, "--max-len-b", 15, "--num-workers", 0, *flags],
    )
    found = [line.split("\t")[2] for line in log.splitlines() if line.startswith("H-")]
    assert len(found) == 220
    return found


PROMPTS = "the new cell opens the last window and the\nthe first page closes the empty list and\nthe\n"


def prompted(data, path, *flags, kernels=False) -> tuple[list[str], list[float], str]:
    """What fairseq-interactive makes of prompts: texts, scores of texts and tokens, and its log."""
    log = run(
        *["fairseq-interactive", data, *PLUGIN, "--path", path, "--cpu", "--buffer-size", 3, "--batch-size", 3],
        *["--tokens-per-sample", BLOCK, "--beam", 2, "--max-len-b", 14, *flags],
        input=PROMPTS,
        kernels=kernels,
    )
    texts = re.findall(r"^H-\d\t\S+\t(.*)", log, re.MULTILINE)
    scores = re.findall(r"^[HP]-\d\t([-. \d]+)", log, re.MULTILINE)
    assert len(texts) == 3
    return texts, [float(score) for line in scores for score in line.split()], log


@pytest.fixture(scope="module")
def dense_lm(text_bin, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense-lm")
    return folder / "checkpoint_last.pt", train(text_bin, folder)


@pytest.fixture(scope="module")
def lm_stats(text_bin, dense_lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("lm-stats") / "stats.safetensors"
    run("ap-record", text_bin, "--path", dense_lm[0], "--importance", "--cpu", "--num-workers", 0, "-o", path)
    return path


@pytest.fixture(scope="module")
def lm_masks(lm_stats, tmp_path_factory):
    path = tmp_path_factory.mktemp("lm-masks") / "masks.safetensors"
    run("ap-masks", lm_stats, "--decoder-self", 0.5, "-o", path)
    return path


def test_training_under_all_ones_masks_is_stock_training(text_bin, dense_lm, tmp_path):
    log = train(text_bin, tmp_path, "--attention-masks", "none", arch="pruned_transformer_lm")
    assert len(losses(log)) > 40
    assert losses(log) == losses(dense_lm[1])


def test_statistics_of_full_blocks_have_equal_support(lm_stats, text_bin, dense_lm, tmp_path):
    """Every block has all its positions but for the last, so a cell is as well observed as any other."""
    stats = AttentionStats.load(lm_stats)
    assert stats.architecture == {"decoder_self": [2, 2]}
    assert "languages" not in stats.metadata
    support = stats.support[KIND]
    assert support.shape == (BLOCK, BLOCK)
    blocks = stats.metadata["sentences"]
    lower = support[np.tril_indices(BLOCK)]
    assert set(lower.tolist()) <= {blocks, blocks - 1} and not np.triu(support, 1).any()
    rows = stats.mass[KIND].sum(-1)
    np.testing.assert_allclose(rows, np.broadcast_to(np.diag(support), rows.shape), rtol=1e-5)
    assert stats.importance[KIND].any()

    half = tmp_path / "half.safetensors"
    blocks_of = ["--task", "language_modeling", "--sample-break-mode", "none", "--tokens-per-sample", BLOCK // 2]
    log = run("ap-record", text_bin, "--path", dense_lm[0], *blocks_of, "--cpu", "--num-workers", 0, "-o", half)
    assert re.search(r" of [\d,]+ blocks -> .*\n.* recorded in .* [\d,]+ blocks and ", log)
    assert AttentionStats.load(half).support[KIND].shape == (BLOCK // 2, BLOCK // 2)


def test_what_a_language_model_cannot_record_is_refused(text_bin, dense_lm, tmp_path, capsys):
    def refused(*flags) -> str:
        output = tmp_path / "stats.safetensors"
        with pytest.raises(SystemExit) as stop:
            record.main([str(word) for word in (text_bin, "--path", dense_lm[0], "--cpu", "-o", output, *flags)])
        assert stop.value.code == 2 and not output.exists()
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "--task translation: " in refused("--task", "translation")
    assert f"--add-bos-token True: {dense_lm[0]} was trained with False" in refused("--add-bos-token")
    for blocks in (0, 48):
        message = f"--tokens-per-sample {blocks}: the model of {dense_lm[0]} takes 1 to 24 positions"
        assert message in refused("--tokens-per-sample", blocks)
    assert "no subset 'dev'" in refused("--subset", "dev")
    assert f"--max-tokens 6: a block of subset 'train' has {BLOCK} tokens" in refused("--max-tokens", 6)


def test_a_model_or_data_of_another_task_is_one_line(data_bin, dense, text_bin, dense_lm, tmp_path, capsys):
    """They ended in tracebacks of fairseq: a missing attribute, a size mismatch, a missing language pair."""
    with pytest.raises(SystemExit):
        record.main([str(x) for x in (data_bin, "--path", dense_lm[0], "-o", tmp_path / "stats", "--cpu")])
    assert "data-bin has no dictionary dict.txt, as text of one language has" in capsys.readouterr().err
    translate, continue_text = "pruned_translation", "pruned_language_modeling"
    for data, model, name, task, other in (
        (text_bin, dense, "transformer", continue_text, translate),
        (data_bin, dense_lm[0], "transformer_lm", translate, continue_text),
    ):
        message = f"error: --task {task}: {name} is not one of its models; give --task {other}"
        log = run("fairseq-generate", data, *PLUGIN, "--task", task, "--path", model, "--cpu", expect=1)
        assert message in log.splitlines()[-1] and "Traceback" not in log
    flags = ["--arch", "pruned_roberta_tiny", "--criterion", "cross_entropy"]
    log = train_on_text(text_bin, tmp_path, "--task", continue_text, *flags, updates=1, expect=1)
    assert "pruned_roberta_tiny is not one of its models; give --task masked_lm" in log.splitlines()[-1]
    flags = ["--tokens-per-sample", 0, "--attention-masks", "none"]  # a ZeroDivisionError
    log = train(text_bin, tmp_path, *flags, arch="pruned_transformer_lm", task=continue_text, updates=1, expect=1)
    assert "--tokens-per-sample 0: a block has at least 1 token" in log.splitlines()[-1]


def test_masks_applied_without_training(text_bin, dense_lm, lm_masks, tmp_path):
    ones, half = tmp_path / "ones.pt", tmp_path / "half.pt"
    run("ap-apply", dense_lm[0], "--attention-masks", "none", "-o", ones)
    run("ap-apply", dense_lm[0], "--attention-masks", lm_masks, "-o", half)
    convert_to_stock(ones, tmp_path / "stock.pt")
    assert_reads_as_stock(tmp_path / "stock.pt", dense_lm[0])
    with pytest.raises(ArtifactError, match=r"half.pt has masks \(effective sparsity decoder_self 50.0% "):
        convert_to_stock(half, tmp_path / "refused.pt")
    with pytest.raises(ArtifactError, match="holds a model 'transformer_lm'.*fairseq's own architectures need no"):
        convert_to_stock(dense_lm[0], tmp_path / "refused.pt")
    for window in ((), ("--context-window", 8, "--batch-size", 1)):
        stock = evaluate(text_bin, dense_lm[0], *window)
        assert evaluate(text_bin, ones, *window) == stock
        assert evaluate(text_bin, half, *window) != stock
    sampled = ["--beam", 1, "--sampling", "--sampling-topk", 5, "--seed", 3]  # the same in fairseq's own search
    assert continuations(text_bin, ones, *sampled) == continuations(text_bin, dense_lm[0], *sampled)
    by_kernels = ["--task", "pruned_language_modeling", "--model-overrides", "{'attention_backend': 'triton'}"]
    expected, expected_scores, _ = prompted(text_bin, dense_lm[0], "--task", "language_modeling")
    texts, scores, log = prompted(text_bin, ones, *by_kernels, kernels=True)
    assert texts == expected and "fairseq's own generator" not in log
    assert scores == pytest.approx(expected_scores, abs=2e-4)

    (tmp_path / "prompts").write_text(PROMPTS)
    files = ["--input", tmp_path / "prompts", "--output", tmp_path / "continued"]
    options = ["--task", "pruned_language_modeling", "--tokens-per-sample", BLOCK, "--beam", 2, "--max-len-b", 14]
    run("ap-generate", text_bin, "--path", ones, "--cpu", *options, *files)
    assert (tmp_path / "continued").read_text().splitlines() == expected
    options += ["--gen-subset", "test", "--sample-break-mode", "eos", "--batch-size", 16, "--prefix-size", 2]
    options += ["--required-batch-size-multiple", 1, "--cpu", "--num-workers", 0]
    stock, ours = (
        [line for line in run(command, text_bin, "--path", ones, *options, *more).splitlines() if line[1:2] == "-"]
        for command, more in (("fairseq-generate", PLUGIN), ("ap-generate", []))
    )
    assert ours == sorted(stock, key=lambda line: int(re.match(r"\w-(\d+)", line)[1])) and len(ours) == 5 * 220
    log = run("ap-generate", text_bin, "--path", ones, "--cpu", *files, expect=2)
    assert "has one dictionary dict.txt" in log and "add --task pruned_language_modeling" in log


def test_a_model_trained_under_masks_keeps_them(text_bin, lm_masks, tmp_path):
    train(text_bin, tmp_path, "--attention-masks", lm_masks, arch="pruned_transformer_lm", updates=20)
    log = train(text_bin, tmp_path, arch="pruned_transformer_lm", updates=30)  # resumes, without the file
    assert '"num_updates": "30"' in log and "effective sparsity decoder_self 50.0%" in log
    logged = re.findall(r'"train_pruned_decoder_self": "([\d.]+)"', log)
    assert float(logged[-1]) == pytest.approx(0.5, abs=0.01)
    state = load_checkpoint(tmp_path / "checkpoint_last.pt")
    assert decode_provenance(state["model"]["mask_metadata"])["sparsity"]["decoder_self"]["effective"] == pytest.approx(
        0.5, abs=0.01
    )


def test_a_language_model_is_pruned_while_it_trains(text_bin, lm_masks, tmp_path):
    """ap-apply once wrote such checkpoints with their own masks in place of those that it was given.

    fairseq fills batches up with rows of padding, which stopped the pruning as blocks of no tokens.
    """
    schedule = ["--attention-sparsity", 0.8, "--prune-start", 10, "--prune-end", 30, "--prune-every", 10]
    masks = ["--attention-masks", "none", "--prune-sample", 50, "--pad-to-fixed-bsz", "--batch-size", 32]
    log = train(*[text_bin, tmp_path, *masks, *schedule], arch="pruned_transformer_lm", task="pruned_language_modeling")
    shares = [float(share) for share in re.findall(r"update \d+: ([\d.]+)% of the pairs pruned", log)]
    assert shares == pytest.approx([56.3, 77.0, 80.0], abs=1)  # 80% of 1 - (1 - n/3)^3
    assert "50 blocks recorded" in log
    applied = run(
        "ap-apply", tmp_path / "checkpoint_last.pt", "--attention-masks", lm_masks, "-o", tmp_path / "half.pt"
    )
    assert "effective sparsity decoder_self 50.0%" in applied


def test_a_report_of_one_kind(lm_stats, lm_masks, tmp_path):
    run("ap-report", "--stats", lm_stats, "--masks", lm_masks, "-o", tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert "sentence pairs" not in page and "decoder_self" in page and "encoder_self" not in page


def test_architectures_are_those_of_fairseq():
    from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY

    stock = {name for name, model in ARCH_MODEL_REGISTRY.items() if model is TransformerLanguageModel}
    ours = {name for name, model in ARCH_MODEL_REGISTRY.items() if model is PrunedLanguageModel}
    assert {"pruned_transformer_lm_wiki103", "pruned_transformer_lm_gpt2_small", "pruned_transformer_lm_gpt"} <= ours
    assert ours == {f"pruned_{name}" for name in stock}
    for name in stock - {"transformer_lm"}:
        sizes = [argparse.Namespace(decoder_embed_dim=64), argparse.Namespace(decoder_embed_dim=64)]
        for given, arch in zip(sizes, (name, f"pruned_{name}"), strict=True):
            ARCH_CONFIG_REGISTRY[arch](given)
        assert sizes[0] == sizes[1]


def test_sites_of_a_language_model():
    assert architecture(pruned()) == {"decoder_self": [2, 2]}
