"""RoBERTa: one stack of encoder self-attention under masks, through fairseq's own commands."""

import argparse
import os
import random
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from fairseq.models.roberta import RobertaModel
from plugin.builders import batch, dictionary, random_masks
from plugin.commands import PLUGIN, ROOT, assert_reads_as_stock, losses, run, run_process, train_on_text

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.files import UserError
from ap_fairseq.model.checkpoints import load_checkpoint
from ap_fairseq.model.roberta import PrunedRobertaModel
from ap_fairseq.model.stock import convert_to_stock
from ap_fairseq.provenance import decode_provenance, dictionary_sha256
from ap_fairseq.sites import AttentionKind, architecture

KIND = AttentionKind.ENCODER_SELF
VOCAB = dictionary(40)
LENGTHS = [12, 5, 9]
SIZES = dict(
    encoder_layers=2, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=2, max_positions=16
)


def build(model, target=VOCAB, **options):
    torch.manual_seed(5)
    stock = dict(dropout=0.0, attention_dropout=0.0, mha_reg_scale_factor=0.0, ffn_reg_scale_factor=0.0)
    args = argparse.Namespace(**SIZES, **stock, **options)
    return model.build_model(args, argparse.Namespace(cfg=None, source_dictionary=VOCAB, target_dictionary=target))


def encoder_masks(sparsity: float) -> PruningMasks:
    drawn = random_masks(sparsity, longest=(16, 16))
    return PruningMasks({KIND: drawn.keep[KIND]}, {KIND: drawn.extrapolation[KIND]})


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"encoder_normalize_before": True}], ids=str)
def test_all_ones_masks_give_the_outputs_and_gradients_of_fairseq(options):
    stock, ours = build(RobertaModel, **options).double(), build(PrunedRobertaModel, attention_masks="none", **options)
    ours.double()
    assert architecture(ours) == {"encoder_self": [2, 2]}
    for name, parameter in stock.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name)), name
    tokens = batch(LENGTHS, VOCAB, left=False)
    outputs = [model(tokens, masked_tokens=tokens.ne(VOCAB.pad()))[0] for model in (stock, ours)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-11, atol=1e-12)
    for output in outputs:
        output.square().sum().backward()
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("target", [None, dictionary(3)], ids=["none", "labels"])
def test_masks_are_taken_whatever_the_target_of_the_task_is(target, tmp_path):
    masks, sha = encoder_masks(0.5), dictionary_sha256(VOCAB)
    masks.metadata["dictionaries"] = {"source": sha, "target": sha}
    masks.save(tmp_path / "m.safetensors")
    for start in ("none", str(tmp_path / "m.safetensors")):
        begun = build(PrunedRobertaModel, target, attention_masks=start)
        assert begun.masks_provenance()["dictionaries"]["source"] == sha
    pretrained = build(PrunedRobertaModel)
    pretrained.set_masks(masks)
    model = build(PrunedRobertaModel, target)
    model.load_state_dict(pretrained.state_dict())
    assert model.masks_provenance()["dictionaries"]["source"] == sha


def test_heads_with_masks_are_not_removed():
    with pytest.raises(UserError, match="--mha-heads-to-keep 1: masks belong to heads"):
        build(PrunedRobertaModel, mha_heads_to_keep=1)


def test_masks_prune_and_padding_changes_nothing():
    model = build(PrunedRobertaModel).double().eval()
    model.set_masks(encoder_masks(0.0))
    tokens = batch(LENGTHS, VOCAB, left=False)
    whole, _ = model(tokens, features_only=True)
    model.set_masks(encoder_masks(0.6))
    pruned, _ = model(tokens, features_only=True)
    assert not torch.allclose(pruned[0], whole[0])
    for row, length in enumerate(LENGTHS):
        alone, _ = model(tokens[row : row + 1, :length], features_only=True)
        torch.testing.assert_close(pruned[row, :length], alone[0], rtol=1e-11, atol=1e-12)


def test_checkpoints_of_fairseq_0_12_2_load():
    """They hold zero-filled copies of each layer's parameters, under names that no other release knows."""
    state = build(RobertaModel).state_dict()
    expected = state["encoder.sentence_encoder.layers.0.fc1.weight"].clone()
    state["encoder.sentence_encoder.layers.0.fc1_weight"] = torch.zeros_like(expected)
    model = build(PrunedRobertaModel, attention_masks="none")
    model.load_state_dict(state)
    assert torch.equal(model.get_parameter("encoder.sentence_encoder.layers.0.fc1.weight"), expected)


# -- fairseq's commands -----------------------------------------------------------------------------------------------

TINY = "--encoder-layers 2 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --encoder-attention-heads 2".split()


def train(data, save_dir, *flags, task="masked_lm", arch="roberta", updates=30) -> str:
    text = ["--tokens-per-sample", 32, "--sample-break-mode", "complete"] if task == "masked_lm" else []
    own = ["--task", task, "--criterion", task, "--arch", arch, *TINY, *text, *flags]
    return train_on_text(data, save_dir, *own, updates=updates)


@pytest.fixture(scope="module")
def class_bin(toy_text, text_bin, tmp_path_factory):
    """The toy text for masked_lm, and below it a classification set: do the words come in their order or reversed?"""
    raw = tmp_path_factory.mktemp("classes")
    folder = shutil.copytree(text_bin, raw / "data-bin")
    draw = random.Random(3)
    for split in ("train", "valid"):
        lines = (toy_text / f"{split}.en").read_text("utf-8").splitlines()[:300]
        labels = [draw.choice(["straight", "reversed"]) for _ in lines]
        text = [" ".join(reversed(t.split())) if n == "reversed" else t for t, n in zip(lines, labels, strict=True)]
        (raw / f"{split}.input0").write_text("".join(f"{line}\n" for line in text), "utf-8")
        (raw / f"{split}.label").write_text("".join(f"{label}\n" for label in labels), "utf-8")
    for part, own in (("input0", ["--srcdict", folder / "dict.txt"]), ("label", [])):
        pairs = [word for split in ("train", "valid") for word in (f"--{split}pref", raw / f"{split}.{part}")]
        run("fairseq-preprocess", "--only-source", *own, *pairs, "--destdir", folder / part)
    return folder


@pytest.fixture(scope="module")
def dense_roberta(class_bin, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense-roberta")
    return folder / "checkpoint_last.pt", train(class_bin, folder)


@pytest.fixture(scope="module")
def roberta_masks(class_bin, dense_roberta, tmp_path_factory):
    folder = tmp_path_factory.mktemp("roberta-masks")
    stats, masks = folder / "stats.safetensors", folder / "masks.safetensors"
    run("ap-record", class_bin, "--path", dense_roberta[0], "--importance", "--cpu", "--num-workers", 0, "-o", stats)
    run("ap-masks", stats, "--encoder-self", 0.5, "-o", masks)
    return stats, masks


def test_training_under_all_ones_masks_is_stock_training(class_bin, dense_roberta, tmp_path):
    log = train(class_bin, tmp_path, "--attention-masks", "none", arch="pruned_roberta")
    assert len(losses(log)) > 30
    assert losses(log) == losses(dense_roberta[1])


def test_statistics_of_an_encoder(roberta_masks):
    stats = AttentionStats.load(roberta_masks[0])
    assert stats.architecture == {"encoder_self": [2, 2]}
    support = stats.support[KIND]
    assert (support == support.T).all() and support[0, 0] == stats.metadata["sentences"]
    assert stats.importance[KIND].any()


def test_a_pruned_encoder_is_fine_tuned_and_classifies(class_bin, dense_roberta, roberta_masks, tmp_path):
    """Masks recorded under masked_lm hold for sentence_prediction: the dictionary and the positions are the same."""
    pretrained = tmp_path / "pretrained"
    start = ["--finetune-from-model", dense_roberta[0], "--attention-masks", roberta_masks[1]]
    train(class_bin, pretrained, *start, arch="pruned_roberta", updates=10)
    classes = ["--num-classes", 2, "--init-token", 0, "--separator-token", 2, "--classification-head-name", "order"]
    log = train(
        *[class_bin, tmp_path / "tuned", *classes, "--max-positions", 32, "--best-checkpoint-metric", "accuracy"],
        *["--restore-file", pretrained / "checkpoint_last.pt", "--reset-optimizer", "--reset-dataloader"],
        *["--reset-meters", "--reset-lr-scheduler"],
        **dict(task="sentence_prediction", arch="pruned_roberta", updates=60),
    )
    assert "effective sparsity encoder_self 50.0%" in log
    accuracy = [float(share) for share in re.findall(r'"valid_accuracy": "([\d.]+)"', log)]
    assert accuracy[-1] > 90  # of 60 sentences; half of them by chance
    tuned = tmp_path / "tuned" / "checkpoint_last.pt"
    provenance = decode_provenance(load_checkpoint(tuned)["model"]["mask_metadata"])
    assert provenance["sparsity"]["encoder_self"]["effective"] == pytest.approx(0.5, abs=0.01)

    stats = tmp_path / "stats.safetensors"
    run("ap-record", class_bin, "--path", tuned, "--importance", "--sample", 50, "--cpu", "-o", stats)
    recorded = AttentionStats.load(stats)
    assert recorded.metadata["sentences"] == 50 and recorded.importance[KIND].any()

    applied = tmp_path / "applied.pt"
    run("ap-apply", dense_roberta[0], "--attention-masks", roberta_masks[1], "-o", applied)
    convert_to_stock(applied, tmp_path / "stock.pt", drop_masks=True)
    assert_reads_as_stock(tmp_path / "stock.pt", dense_roberta[0])
    valid = ["--valid-subset", "test", "--cpu", "--max-tokens", 960, "--num-workers", 0]
    run("fairseq-validate", class_bin, *PLUGIN, "--path", applied, "--task", "masked_lm", *valid)


# -- GLUE -------------------------------------------------------------------------------------------------------------

GLUE = ROOT / "examples/package_sections/glue.sh"


def forked_glue(*words, folder, environment) -> None:
    """Run what the recipe runs, in forks, which start in no time: programs in the places of its commands note them."""
    programs = folder / "programs"
    programs.mkdir()
    for name in ("fairseq-train", "ap-record", "ap-masks"):
        (programs / name).write_text(f'#!/bin/bash\nprintf "%q " {name} "$@" >&2\necho >&2\n')
        (programs / name).chmod(0o755)
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    noted = [shlex.split(line) for line in run_process(GLUE, *words, environment=environment | path).splitlines()]
    assert [name for name, *_ in noted] == ["fairseq-train", "ap-record", "ap-masks", "fairseq-train"]
    for command in noted:
        printed = run(*command)
        if "--save-dir" in command:
            Path(f"{command[command.index('--save-dir') + 1]}.log").write_text(printed)


@pytest.mark.parametrize("task, score", [("RTE", "accuracy"), ("STS-B", "loss")])
def test_the_recipe_of_glue_on_a_toy_task(task, score, class_bin, dense_roberta, tmp_path):
    """All its commands run: of a task with classes, and of the one with numbers, which fairseq reads as text."""
    data = shutil.copytree(class_bin, tmp_path / "data-bin")
    for split in ("train", "valid"):
        labels = (class_bin.parent / f"{split}.label").read_text("utf-8")
        (data / "label" / f"{split}.label").write_text(labels.replace("straight", "5.0").replace("reversed", "0.5"))
    flags = [*TINY, *"--max-positions 32 --max-update 5 --cpu --num-workers 0".split()]
    own = dict(environment={"ARCH": "roberta", "FP16": ""})
    words = [task, data, dense_roberta[0], tmp_path / "out", 0.6, *flags]
    if score == "accuracy":
        run_process(GLUE, *words, **own)
    else:  # the same script, whose commands need not start anew each
        forked_glue(*words, folder=tmp_path, **own)
    for name in ("dense", "pruned"):
        log = (tmp_path / f"out/{name}.log").read_text("utf-8")
        assert re.search(rf"valid on 'valid' subset .*\| {score} [\d.]+", log)
    masks = PruningMasks.load(tmp_path / "out/masks.safetensors")
    assert masks.metadata["sparsity"]["encoder_self"]["effective"] == pytest.approx(0.6, abs=0.01)
    tuned = load_checkpoint(tmp_path / "out/pruned/checkpoint_best.pt")["model"]
    assert decode_provenance(tuned["mask_metadata"])["sparsity"] == masks.metadata["sparsity"]


def test_the_recipe_of_glue_names_its_tasks_and_arguments():
    assert "TASK WNLI is not MNLI," in run_process(GLUE, "WNLI", "data", "model.pt", "out", expect=2)
    assert "glue.sh TASK DATA_BIN PRETRAINED OUT" in run_process(GLUE, "RTE", expect=2)
