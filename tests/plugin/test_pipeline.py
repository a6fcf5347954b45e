"""The whole pipeline through the real commands, in processes of their own, as a user runs it."""

import argparse
import json
import re
import shutil

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from plugin.commands import FEW, PLUGIN, ROOT, TINY, generate, run, run_process, train

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.cli import apply, evaluate, record
from ap_fairseq.cli import masks as cli_masks
from ap_fairseq.files import UserError
from ap_fairseq.model.checkpoints import load_checkpoint
from ap_fairseq.provenance import decode_provenance
from ap_fairseq.sites import AttentionKind
from ap_fairseq.tasks import PrunedTranslationTask


def hypotheses(log: str) -> dict[int, tuple[float, str]]:
    """Sentence number -> (score, tokens) of the H lines."""
    return {int(n): (float(s), h) for n, s, h in re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", log, re.M)}


def alignments(log: str) -> dict[int, np.ndarray]:
    """Sentence number -> soft alignment (target, source) of the A lines."""
    lines = re.findall(r"^A-(\d+)\t(.*)$", log, re.M)
    return {int(n): np.array([[float(p) for p in row.split(",")] for row in text.split()]) for n, text in lines}


def losses(log: str) -> list[float]:
    return [float(x) for x in re.findall(r'train_inner \| .*?"loss": "([0-9.]+)"', log)]


@pytest.fixture(scope="session")
def all_ones(stats_file, dense, data_bin, tmp_path_factory):
    """The dense checkpoint as a pruned one with all-ones masks."""
    folder = tmp_path_factory.mktemp("all-ones")
    run("ap-masks", stats_file, "--total", 0, "-o", folder / "masks.safetensors")
    run("ap-apply", dense, "--attention-masks", folder / "masks.safetensors", "--data", data_bin, "-o", folder / "p.pt")
    return folder / "p.pt"


@pytest.fixture(scope="session")
def tuned(data_bin, dense, masks_file, tmp_path_factory):
    """A checkpoint folder: fine-tuned from the dense checkpoint under 50% masks for 30 updates, then resumed to 60."""
    folder = tmp_path_factory.mktemp("tuned")
    flags = ["--finetune-from-model", dense, "--attention-masks", masks_file]
    flags += ["--tensorboard-logdir", folder / "tensorboard"]
    log = train(data_bin, folder, *flags, arch="pruned_transformer", updates=30)
    assert "loading pretrained model from" in log and "effective sparsity" in log
    shutil.copy(folder / "checkpoint_last.pt", folder / "checkpoint_30.pt")
    log = train(data_bin, folder, arch="pruned_transformer", updates=60)  # no masks given: the checkpoint has them
    assert "Loaded checkpoint" in log and "@ 30 updates" in log
    (folder / "resumed.log").write_text(log)
    return folder


@pytest.fixture(scope="session")
def translated(data_bin, tuned) -> str:
    """The log of a translation by that checkpoint."""
    return generate(data_bin, tuned / "checkpoint_last.pt")


def test_training_logs_carry_the_effective_sparsity(tuned, masks_file):
    """In fairseq's progress bar after a resume, when the masks come from the checkpoint, and in TensorBoard."""
    entries = re.findall(r"\| train_inner \| ({.*})", (tuned / "resumed.log").read_text())
    sparsity = PruningMasks.load(masks_file).metadata["sparsity"]
    assert len(entries) == 30
    for kind in AttentionKind:
        logged = [float(json.loads(entry)[f"pruned_{kind.value}"]) for entry in entries]
        assert logged == pytest.approx([sparsity[kind.value]["effective"]] * 30, abs=1e-4)
    (events,) = (tuned / "tensorboard" / "train_inner").iterdir()
    assert all(f"pruned_{kind.value}".encode() in events.read_bytes() for kind in AttentionKind)


def test_all_ones_masks_translate_as_stock_fairseq_does(data_bin, toy_text, dense, all_ones, tmp_path):
    """Hypotheses, scores and alignments of 220 sentences, with fairseq's left-padded batches.

    Masked heads change those sentences alone whose line in the file hides tokens from them.
    """
    stock, ours = (generate(data_bin, path, "--print-alignment", "soft") for path in (dense, all_ones))
    expected, found = hypotheses(stock), hypotheses(ours)
    assert len(expected) == len(found) >= 200
    for n, (score, tokens) in expected.items():
        assert found[n][1] == tokens
        assert found[n][0] == pytest.approx(score, abs=1e-5)
    expected, found = alignments(stock), alignments(ours)
    assert expected.keys() == found.keys() and len(expected) >= 200
    for n in expected:
        np.testing.assert_allclose(found[n], expected[n], atol=2e-6)

    lines = (toy_text / "test.en").read_text("utf-8").splitlines()
    seen = [["01"[n % 2]] * (len(line.split()) + 1) for n, line in enumerate(lines)]
    (tmp_path / "seen.txt").write_text("".join(" ".join(row) + "\n" for row in seen))
    task = ["--task", "pruned_translation", "--head-masking", tmp_path / "seen.txt", "--masked-heads", "0:0,1:1"]
    masked, free = hypotheses(generate(data_bin, all_ones, *task)), hypotheses(ours)
    alike = {n for n in free if masked[n] == (pytest.approx(free[n][0], abs=1e-5), free[n][1])}
    assert alike == {*range(1, len(lines), 2)}


def test_the_task_pruned_translation_translates_as_stock_fairseq_does(data_bin, dense, all_ones):
    """By the kernels, and on a CPU without them."""
    task, short = ["--task", "pruned_translation"], ["--beam", 2, "--max-len-a", 0, "--max-len-b", 4, *FEW]
    by_kernels = [*task, "--model-overrides", "{'attention_backend': 'triton'}"]
    for search, backends in (([], (by_kernels, task)), (["--prefix-size", 2, "--print-alignment"], (by_kernels,))):
        stock = generate(data_bin, dense, *short, *search, subset="valid")
        for flags in backends:
            kernels = flags is by_kernels
            log = generate(data_bin, all_ones, *short, *search, *flags, subset="valid", kernels=kernels)
            expected, found = hypotheses(stock), hypotheses(log)
            assert {n: h for n, (_, h) in found.items()} == {n: h for n, (_, h) in expected.items()}
            assert len(found) == 12
            assert all(found[n][0] == pytest.approx(score, abs=1e-4) for n, (score, _) in expected.items())
            aligned, theirs = (sorted(re.findall(r"^A-.*", text, re.MULTILINE)) for text in (log, stock))
            assert aligned == theirs and bool(aligned) == ("--print-alignment" in search)
            assert "fairseq's own generator" not in log


def test_the_task_pruned_translation_trains_with_eval_bleu(data_bin, masks_file, tmp_path):
    flags = ["--task", "pruned_translation", "--attention-masks", masks_file, "--eval-bleu", "--eval-bleu-remove-bpe"]
    flags += ["sentencepiece", "--eval-bleu-args", '{"beam": 2, "max_len_b": 10}']
    log = train(data_bin, tmp_path, *flags, arch="pruned_transformer", updates=3)
    assert re.search(r"valid_bleu|\| bleu [0-9]", log)
    assert log.count("caches hold what") == 1


def test_all_ones_masks_train_as_stock_fairseq_does(data_bin, all_ones, tmp_path):
    """20 updates from scratch, same seed, no dropout: the same losses and the same parameters."""
    flags = ["--dropout", 0, "--disable-validation"]
    stock = train(data_bin, tmp_path / "stock", *flags, updates=20)
    masks = ["--attention-masks", all_ones.with_name("masks.safetensors")]
    ours = train(data_bin, tmp_path / "ours", *flags, *masks, arch="pruned_transformer", updates=20)
    assert len(losses(stock)) == 20
    np.testing.assert_allclose(losses(ours), losses(stock), atol=0.002)  # printed with three digits
    a, b = (load_checkpoint(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("stock", "ours"))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, atol=2e-4, rtol=1e-3)


def test_recorded_statistics_cover_the_training_data(stats_file, toy_text):
    """fairseq main drops a last batch whose size is not a multiple of 8; ap-record must not lose those sentences."""
    stats = AttentionStats.load(stats_file)
    lengths = [len(line.split()) + 1 for line in (toy_text / "train.en").read_text().splitlines()]
    assert stats.metadata["sentences"] == len(lengths) == 1000
    assert stats.support[AttentionKind.ENCODER_SELF].sum() == sum(n * n for n in lengths)
    assert stats.metadata["data"] == [{"name": "data-bin", "subset": "train"}]
    for kind in AttentionKind:
        row_mass = stats.mass[kind][..., 0, :].sum(-1)  # every sentence has a row 0
        np.testing.assert_allclose(row_mass, 1000, rtol=1e-5)


def test_training_in_another_direction_than_that_of_the_masks_is_announced(data_bin, masks_file, tuned, tmp_path):
    """One dictionary for both languages silently let masks of en-de prune a de-en model."""
    notice = "the masks were recorded in another direction: en to de, the data are de to en"
    other = ["-s", "de", "-t", "en", "--disable-validation"]
    for start in (["--attention-masks", masks_file], ["--finetune-from-model", tuned / "checkpoint_30.pt"]):
        log = train(data_bin, tmp_path / start[0], *other, *start, arch="pruned_transformer", updates=1)
        assert log.count(notice) == 1
    assert "another direction" not in (tuned / "resumed.log").read_text()


def test_masks_meet_their_budget_on_recorded_data(masks_file):
    masks = PruningMasks.load(masks_file)
    for kind in AttentionKind:
        assert masks.metadata["sparsity"][kind.value]["effective"] == pytest.approx(0.5, abs=0.01)
        assert masks.metadata["sparsity"][kind.value]["kept_mass"] > 0.6


def test_a_pruned_checkpoint_is_self_contained(tuned, translated, masks_file):
    """The masks are in the checkpoint, their file's name is not; a checkpoint survives a moved or changed file."""
    state = load_checkpoint(tuned / "checkpoint_last.pt")
    assert str(masks_file) not in str(state["cfg"]) and state["cfg"]["model"]["attention_masks"] is None
    assert re.search(r"attention masks [0-9a-f]{12}: effective sparsity cross 50\.\d%", translated)
    assert len(hypotheses(translated)) == 220


def test_training_improves_after_the_warm_start_and_the_resume(data_bin, tuned, translated, dense, toy_text):
    """60 updates more, under masks of half the pairs, end far above the dense model: about 90 BLEU after 56 here.

    The test passed for a pruned model 15 BLEU below the dense one, which a failed warm start could reach.
    """
    bleu = {}
    tuned_last = tuned / "checkpoint_last.pt"
    for name, path, log in (("dense", dense, generate(data_bin, dense)), ("tuned", tuned_last, translated)):
        (tuned / f"{name}.log").write_text(log)
        system = f"{name}={tuned / f'{name}.log'},{path}"
        output = tuned / f"{name}.json"
        run("ap-evaluate", system, "--reference", toy_text / "test.de", "-o", output, "--overwrite")
        bleu[name] = json.loads(output.read_text())["systems"][0]
    assert bleu["tuned"]["bleu"] > 75 and bleu["tuned"]["bleu"] > bleu["dense"]["bleu"] + 15
    assert bleu["tuned"]["sparsity"]["cross"]["effective"] == pytest.approx(0.5, abs=0.01)
    assert "tok:13a" in bleu["tuned"]["bleu_signature"] and "sparsity" not in bleu["dense"]


def test_an_average_of_parameters_over_the_training_copies_the_masks(data_bin, masks_file, tmp_path):
    flags = ["--attention-masks", masks_file, "--disable-validation", "--store-ema", "--ema-decay", 0.5]
    log = train(data_bin, tmp_path, *flags, arch="pruned_transformer", updates=3)
    assert log.count("attention masks") == 1  # each update loads the average
    state = load_checkpoint(tmp_path / "checkpoint_last.pt")
    average = state["extra_state"]["ema"]
    name = "decoder.layers.1.self_attn.keep_words"
    assert torch.equal(average[name], state["model"][name])
    assert not torch.equal(average["decoder.layers.1.fc1.weight"], state["model"]["decoder.layers.1.fc1.weight"])


def test_layers_can_be_left_out_at_inference(data_bin, tuned):
    """LayerDrop: the model of one layer a side translates with the masks of these layers."""
    path = str(tuned / "checkpoint_last.pt")
    overrides = {"encoder_layers_to_keep": "1", "decoder_layers_to_keep": "0"}
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path], {"data": str(data_bin), **overrides})
    whole = load_checkpoint(path)["model"]
    provenance = model.masks_provenance()
    assert provenance["encoder_layers_to_keep"] == "1" and provenance["masks_sha256"] == model.masks_sha256()
    assert len(model.encoder.layers) == len(model.decoder.layers) == 1
    for kept, stored in (
        ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn"),
        *[("decoder.layers.0.encoder_attn",) * 2],
    ):
        assert torch.equal(model.get_submodule(kept).keep_words, whole[f"{stored}.keep_words"])
    assert len(hypotheses(generate(data_bin, path, "--model-overrides", str(overrides)))) == 220


def test_averaged_checkpoints_keep_their_masks(data_bin, tuned, tmp_path):
    inputs = [tuned / "checkpoint_30.pt", tuned / "checkpoint_last.pt"]
    run("ap-average", *inputs, "-o", tmp_path / "average.pt")
    a, b, average = (load_checkpoint(path)["model"] for path in (*inputs, tmp_path / "average.pt"))
    name = "decoder.layers.1.fc1.weight"
    torch.testing.assert_close(average[name], ((a[name].double() + b[name].double()) / 2).float())
    assert torch.equal(average["encoder.layers.0.self_attn.keep_words"], a["encoder.layers.0.self_attn.keep_words"])
    assert len(hypotheses(generate(data_bin, tmp_path / "average.pt"))) == 220


def test_checkpoints_with_different_masks_do_not_average(tuned, all_ones, tmp_path):
    message = run("ap-average", tuned / "checkpoint_last.pt", all_ones, "-o", tmp_path / "a.pt", expect=2)
    assert "differs between" in message and "same masks" in message and not (tmp_path / "a.pt").exists()


def test_interactive_and_from_pretrained_translate_alike(data_bin, tuned, translated, toy_text):
    """fairseq-interactive always pads on the left; the hub interface loads by the registered model."""
    source = (toy_text / "test.en").read_text().splitlines()[:6]
    flags = ["--path", tuned / "checkpoint_last.pt", "--cpu", "--beam", 3, "--buffer-size", 6, "--max-tokens", 500]
    log = run_process(
        *["fairseq-interactive", data_bin, *PLUGIN, *flags, "--source-lang", "en", "--target-lang", "de"],
        input="\n".join(source) + "\n",
    )
    generated, interactive = hypotheses(translated), hypotheses(log)
    assert [interactive[n][1] for n in range(6)] == [generated[n][1] for n in range(6)]

    from fairseq.models.transformer import TransformerModel

    hub = TransformerModel.from_pretrained(str(tuned), "checkpoint_last.pt", str(data_bin))
    assert [hub.translate(line, beam=3) for line in source] == [generated[n][1] for n in range(6)]


def test_the_hub_keeps_its_generator_and_aligns_as_stock_does(data_bin, dense, all_ones, toy_text):
    """fairseq prepares hub models once, for calls with and without alignments."""
    from fairseq.models.transformer import TransformerModel

    lines = (toy_text / "test.en").read_text().splitlines()[:3]
    task = {"_name": "pruned_translation"}
    stock, ours = (
        TransformerModel.from_pretrained(str(path.parent), path.name, str(data_bin), task=task)
        for path in (dense, all_ones)
    )
    assert isinstance(ours.task, PrunedTranslationTask)
    found, expected = (h.generate([h.encode(x) for x in lines], beam=3, print_alignment="hard") for h in (ours, stock))
    for mine, theirs in zip(found, expected, strict=True):
        assert [h["alignment"] for h in mine] == [h["alignment"] for h in theirs] and mine[0]["alignment"]
    assert not ours.models[0].decoder.alignment_needed

    generators = [ours.task.build_generator(ours.models, argparse.Namespace(beam=beam)) for beam in (3, 3, 4)]
    assert generators[0] is generators[1] and generators[2] is not generators[1]
    assert [ours.translate(x, beam=3) for x in lines] == [stock.translate(x, beam=3) for x in lines]

    ours.task.cfg.cpu_int8 = True
    exact, rounded = (hub.generate(hub.encode(lines[0]), beam=3)[0]["score"] for hub in (stock, ours))
    assert 0 < abs(exact - rounded) < 0.1
    with pytest.raises(UserError, match="--cpu-int8 with --score-reference"):
        ours.task.build_generator(ours.models, argparse.Namespace(score_reference=True))
    ours.task.cfg.eval_bleu = True
    with pytest.raises(UserError, match="--cpu-int8 with --eval-bleu"):
        ours.task.build_generator(ours.models, argparse.Namespace(beam=3))


def test_validate_runs_a_pruned_checkpoint(data_bin, tuned):
    flags = ["--path", tuned / "checkpoint_last.pt", "--valid-subset", "valid", "--cpu", "--max-tokens", 2000]
    log = run("fairseq-validate", data_bin, *PLUGIN, "--task", "translation", *flags)
    assert "effective sparsity" in log and "valid on 'valid' subset" in log


@pytest.mark.parametrize(
    "search",
    [
        ["--sampling", "--sampling-topp", 0.9, "--nbest", 3, "--seed", 3],
        ["--diverse-beam-groups", 3],
        ["--diversity-rate", 0.5],
        ["--prefix-size", 2, "--no-repeat-ngram-size", 2],  # of which the latter changes nothing in stock fairseq
        ["--match-source-len"],
        ["--score-reference"],
    ],
)
def test_every_search_agrees_with_stock_fairseq_under_all_ones_masks(data_bin, dense, all_ones, search):
    stock, ours = (hypotheses(generate(data_bin, path, *search, subset="valid")) for path in (dense, all_ones))
    assert {n: h for n, (_, h) in stock.items()} == {n: h for n, (_, h) in ours.items()} and len(stock) == 60
    assert all(ours[n][0] == pytest.approx(score, abs=1e-4) for n, (score, _) in stock.items())


def test_constraints_are_met_as_in_stock_fairseq(data_bin, dense, all_ones, toy_text):
    text = "".join(f"{source}\tneue\n" for source in (toy_text / "test.en").read_text().splitlines()[:5])
    found = []
    for path, task in ((dense, "translation"), (all_ones, "translation"), (all_ones, "pruned_translation")):
        flags = ["--path", path, "--task", task, "--constraints", "--cpu", "--beam", 3, "--source-lang", "en"]
        log = run("fairseq-interactive", data_bin, *PLUGIN, *flags, "--target-lang", "de", input=text)
        found.append({n: tokens for n, (_, tokens) in hypotheses(log).items()})
    assert found[0] == found[1] == found[2] and len(found[0]) == 5
    assert all("neue" in tokens for tokens in found[0].values())


def test_an_ensemble_with_a_dense_model_gives_what_two_dense_models_give(data_bin, dense, all_ones):
    found = []
    for other, task in ((dense, "translation"), (all_ones, "translation"), (all_ones, "pruned_translation")):
        log = generate(data_bin, f"{dense}:{other}", "--task", task, subset="valid")
        found.append({n: tokens for n, (_, tokens) in hypotheses(log).items()})
    assert found[0] == found[1] == found[2] and len(found[0]) == 60


def test_hydra_train_reads_model_and_pruning_from_yaml(data_bin, masks_file, tmp_path):
    sizes = {flag[2:].replace("-", "_"): TINY[k + 1] for k, flag in enumerate(TINY[:-1]) if flag.startswith("--")}
    sizes = {name: int(value) for name, value in sizes.items() if value.isdigit()}
    config = {
        "common": {"user_dir": str(ROOT / "ap_fairseq"), "cpu": True, "log_format": "json", "log_interval": 1},
        "checkpoint": {"save_dir": str(tmp_path / "out"), "no_epoch_checkpoints": True},
        "task": {"_name": "pruned_translation", "data": str(data_bin), "source_lang": "en", "target_lang": "de"}
        | {"attention_sparsity": 0.7, "prune_start": 3, "prune_end": 3, "prune_sample": 50},
        "model": {"_name": "pruned_transformer", "share_all_embeddings": True, **sizes}
        | {"attention_masks": str(masks_file)},
        "criterion": {"_name": "label_smoothed_cross_entropy", "label_smoothing": 0.1},
        "optimizer": {"_name": "adam", "lr": [0.001]},
        "lr_scheduler": {"_name": "fixed", "lr": [0.001]},
        "optimization": {"max_update": 5, "lr": [0.001]},
        "dataset": {"max_tokens": 2000},
        "distributed_training": {"distributed_world_size": 1},
    }
    (tmp_path / "pruned.yaml").write_text(json.dumps(config))  # JSON is YAML
    command = ["fairseq-hydra-train", "--config-dir", tmp_path, "--config-name", "pruned"]
    run_process(*command, cwd=tmp_path)
    state = load_checkpoint(tmp_path / "out" / "checkpoint_last.pt")
    assert state["cfg"]["model"]["encoder_layers"] == 2 and state["cfg"]["model"]["attention_masks"] is None
    provenance = decode_provenance(state["model"]["mask_metadata"])
    assert provenance["sentences"] == 50 and provenance["total"]["effective"] == pytest.approx(0.7, abs=0.01)
    log = run_process(*command, "task.attention_sparsity=7", cwd=tmp_path, expect=1)
    fault = "error: --attention-sparsity 7.0 is not a share of pairs between 0 and 1\n"
    assert log.endswith(f"fairseq-hydra-train: {fault}") and "Traceback" not in log


def with_bettertransformer_keys(path, output) -> None:
    """Add what official fairseq 0.12.2 adds to every encoder layer, and its flat ``args`` instead of ``cfg``."""
    state = load_checkpoint(path)
    for layer in range(2):
        for name, shape in {"in_proj": (96, 32), "out_proj": (32, 32), "fc1": (64, 32), "fc2": (32, 64)}.items():
            state["model"][f"encoder.layers.{layer}.{name}_weight"] = torch.zeros(shape)
            state["model"][f"encoder.layers.{layer}.{name}_bias"] = torch.zeros(shape[0])
    torch.save(state, output)


def as_legacy_args(path, output) -> None:
    """Store the flat ``args`` of fairseq before 0.10 instead of ``cfg``."""
    state = load_checkpoint(path)
    cfg = state["cfg"]
    flat = {}
    for group in ("common", "dataset", "optimization", "checkpoint", "task", "criterion", "optimizer", "lr_scheduler"):
        values = cfg[group] if isinstance(cfg[group], dict) else vars(cfg[group])
        flat.update({k: v for k, v in values.items() if k != "_name"})
    flat.update({k: v for k, v in vars(cfg["model"]).items() if k != "_name"})
    flat.update(arch="transformer", task="translation", criterion="label_smoothed_cross_entropy", optimizer="adam")
    flat.update(lr_scheduler="inverse_sqrt")
    state["args"], state["cfg"] = argparse.Namespace(**flat), None
    torch.save(state, output)


@pytest.mark.parametrize("convert", [with_bettertransformer_keys, as_legacy_args])
def test_checkpoints_of_older_fairseq_record_apply_and_tune(data_bin, dense, stats_file, masks_file, tmp_path, convert):
    """Stock fairseq main refuses 0.12.2's zero-filled copies as unexpected keys; they hold nothing."""
    convert(dense, tmp_path / "old.pt")
    record = ["ap-record", data_bin, "--path", tmp_path / "old.pt", "--subset", "train", "--cpu", "--max-tokens", 2000]
    run(*record, "-o", tmp_path / "s.safetensors")
    old, new = AttentionStats.load(tmp_path / "s.safetensors"), AttentionStats.load(stats_file)
    for kind in AttentionKind:
        np.testing.assert_allclose(old.mass[kind], new.mass[kind], atol=1e-9)
    flags = ["--finetune-from-model", tmp_path / "old.pt", "--attention-masks", masks_file, "--disable-validation"]
    log = train(data_bin, tmp_path / "tuned", *flags, arch="pruned_transformer", updates=2)
    assert len(losses(log)) == 2
    apply = ["ap-apply", tmp_path / "old.pt", "--attention-masks", masks_file, "--data", data_bin]
    run(*apply, "-o", tmp_path / "applied.pt")


def test_bf16_and_fp16_weights_translate_close_to_fp32(data_bin, all_ones):
    """Half precision must leave the packed masks alone."""
    from fairseq import checkpoint_utils

    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(all_ones)], {"data": str(data_bin)})
    task.load_dataset("valid")
    sample = task.dataset("valid").collater([task.dataset("valid")[k] for k in range(4)])
    model.eval()
    with torch.no_grad():
        exact = model(**sample["net_input"])[0]
        for dtype in (torch.bfloat16, torch.float16):
            rough = model.to(dtype)(**sample["net_input"])[0]
            assert rough.dtype == dtype and model.masks_provenance() is not None
            real = sample["target"].ne(task.target_dictionary.pad())
            assert (rough.float()[real].argmax(-1) == exact[real].argmax(-1)).float().mean() > 0.9


def test_errors_name_the_fault_and_write_nothing(
    data_bin, text_bin, dense, stats_file, masks_file, tmp_path, toy_text, capsys
):
    """Bad input of each command: one line that names what is wrong and what to do, exit status 2, no output file."""
    out = tmp_path / "out.safetensors"
    cut = tmp_path / "cut.pt"
    cut.write_bytes(dense.read_bytes()[:2000])
    cases = [
        (record.main, [data_bin, "--path", tmp_path / "no.pt", "-o", out], "no.pt does not exist; expected"),
        (record.main, [tmp_path / "no", "--path", dense, "-o", out], "data folder .*no does not exist"),
        (record.main, [data_bin, "--path", cut, "-o", out, "--cpu"], "cut.pt cannot be read as a checkpoint"),
        (record.main, [data_bin, "--path", dense, "-o", out, "--subset", "dev", "--cpu"], "no subset 'dev' in"),
        (record.main, [data_bin, "--path", dense, "-o", stats_file, "--cpu"], "exists; pass --overwrite"),
        (
            record.main,
            [data_bin, "--path", dense, "-o", out, "--cpu", "-s", "de"],
            "--source-lang de: .* trained with en",
        ),
        (record.main, [text_bin, "--path", dense, "-o", out], "text-bin.* has no text in two languages"),
        (record.main, [data_bin, "--path", dense, "-o", out, "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (
            record.main,
            [data_bin, "--path", dense, "-o", dense, "--overwrite", "--cpu"],
            "is the input .*; choose another",
        ),
        (cli_masks.main, [stats_file, "-o", stats_file, "--overwrite"], "is the input .*; choose another name"),
        (apply.main, [dense, "--attention-masks", masks_file, "-o", masks_file, "--overwrite"], "is the input"),
        (cli_masks.main, [tmp_path / "no.st", "-o", out], "no.st does not exist"),
        (cli_masks.main, [masks_file, "-o", out], "has format 'ap-pruning-masks-2', expected 'ap-attention-stats-2'"),
        (cli_masks.main, [stats_file, "--cross", 1.0, "-o", out], r"'1.0' is not a share in \[0, 1\)"),
        (cli_masks.main, [stats_file, "--cross", 0.5, "-o", masks_file], "exists; pass --overwrite"),
        (cli_masks.main, [stats_file, "--sparsity", 0.5, "-o", out], "unrecognized arguments: --sparsity"),
        (cli_masks.main, [stats_file, "--granularity", 0, "-o", out], "0 is not N .N x N blocks"),
        (apply.main, [dense, "--attention-masks", stats_file, "-o", out], "expected 'ap-pruning-masks-2'"),
        (apply.main, [dense, "--attention-masks", masks_file, "--data", tmp_path, "-o", out], "pass --data DIR"),
        (apply.main, [dense, "--attention-masks", "", "-o", out], "a name of a file is empty; expected"),  # a TypeError
        (evaluate.main, [f"x={toy_text}/valid.en", "--reference", toy_text / "test.de"], "60 hypotheses for 220 ref"),
        (evaluate.main, ["x=y"], "y is not a file; name a log of fairseq-generate"),
    ]
    for command, arguments, message in cases:
        with pytest.raises(SystemExit) as stop:
            command([str(argument) for argument in arguments])
        printed = capsys.readouterr().err
        assert stop.value.code == 2 and re.search(message, printed), f"{arguments}: {printed[-600:]}"
        assert not out.exists(), arguments


def test_training_stops_without_usable_masks(data_bin, tmp_path):
    """A file that is missing, and a pruned model without any masks: never a silent dense run."""
    missing = ["--attention-masks", tmp_path / "missing.safetensors"]
    log = train(data_bin, tmp_path / "x", *missing, arch="pruned_transformer", updates=1, expect=1)
    assert "missing.safetensors does not exist" in log
    log = train(data_bin, tmp_path / "y", arch="pruned_transformer", updates=1, expect=1)
    assert "this pruned model has no masks: start training with" in log and "begin training epoch" not in log
