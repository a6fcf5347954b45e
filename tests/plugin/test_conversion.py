"""Dense checkpoints of every kind become pruned ones that compute the same, or are refused by name."""

import argparse
import copy
import re

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy_with_alignment import (
    LabelSmoothedCrossEntropyCriterionWithAlignment,
)
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, build_model
from fairseq.models.transformer import TransformerModelBase
from fairseq.models.transformer_align import TransformerAlignModel
from plugin.builders import SIZES, batch, dictionary, pruned_model, random_masks, task
from plugin.commands import changed_checkpoint, generate, run, run_process

from ap_fairseq.artifacts import PruningMasks
from ap_fairseq.files import ArtifactError, UserError
from ap_fairseq.model.checkpoints import load_checkpoint
from ap_fairseq.model.config import PrunedTransformerConfig
from ap_fairseq.model.conversion import apply_masks, pruned_options
from ap_fairseq.model.stock import convert_to_stock, require_dense, stock_options
from ap_fairseq.model.transformer import PrunedTransformerModel
from ap_fairseq.sites import AttentionKind, architecture

VOCAB = dictionary()
PAD = VOCAB.pad()
TRANSFORMERS = [
    name
    for name, model in ARCH_MODEL_REGISTRY.items()
    if name.startswith("transformer") and issubclass(model, TransformerModelBase)
]
REFUSED = {"full_context_alignment"}
INITIALISATION = {"pretrained_xlm_checkpoint", "init_encoder_only", "init_decoder_only"}  # a checkpoint has its outcome


def options_of(model) -> list[argparse.Action]:
    parser = argparse.ArgumentParser()
    model.add_args(parser)
    return [action for action in parser._actions if action.dest != "help"]


def changed(action: argparse.Action):
    """Another value of an option than its default."""
    if action.nargs == 0:
        return action.const
    if action.choices:
        return next(choice for choice in action.choices if choice != action.default)
    if action.dest.endswith("layers_to_keep"):
        return "0,1"
    return {int: 3, float: 0.25}.get(action.type, "[1, 2]" if "adaptive" in action.dest else "something")


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_option_is_kept_or_refused(name):
    """ap-apply dropped alignment_layer and alignment_heads of transformer_align: other alignments, unsaid."""
    model = ARCH_MODEL_REGISTRY[name]
    given = argparse.Namespace(arch=name, _name=name)
    ARCH_CONFIG_REGISTRY[name](given)
    fields = PrunedTransformerConfig.__dataclass_fields__
    actions = options_of(model)
    assert len(actions) > 50
    for action in actions:
        stored = copy.deepcopy(given)
        setattr(stored, action.dest, changed(action))
        if action.dest in REFUSED:
            with pytest.raises(UserError, match=action.option_strings[0]):
                pruned_options(name, model, stored)
        elif action.dest not in INITIALISATION:
            assert action.dest in fields, action.dest
            assert pruned_options(name, model, stored)[action.dest] == getattr(stored, action.dest), action.dest


def test_models_of_another_function_are_refused():
    class Own(ARCH_MODEL_REGISTRY["transformer"]):
        """A user's model, which may compute anything."""

    for name, model, message in [
        ("own", Own, "class of its own .*Own"),
        ("lstm", ARCH_MODEL_REGISTRY["lstm"], "encoder-decoder transformer"),
        ("bart_base", ARCH_MODEL_REGISTRY["bart_base"], "encoder-decoder transformer|class of its own"),
        ("mine", None, "pass the --user-dir that registers it"),
    ]:
        with pytest.raises(UserError, match=message):
            pruned_options(name, model, argparse.Namespace(arch=name))


def all_ones(model) -> PruningMasks:
    return PruningMasks.all_ones(architecture(model), {})


def sentences(left: bool) -> dict:
    source = batch([5, 3, 7], VOCAB, left, 1)
    target = batch([4, 6, 2], VOCAB, False, 2)
    previous = target.roll(1, 1)
    previous[:, 0] = VOCAB.eos()
    previous[target.eq(PAD)] = PAD
    inputs = {"src_tokens": source, "src_lengths": source.ne(PAD).sum(1), "prev_output_tokens": previous}
    first = source.ne(PAD).long().argmax(1)  # column of token 0
    links = [[int(first[row]) + token, target.size(1) * row + 1] for row, token in ((0, 4), (1, 0), (2, 5))]
    return {
        "net_input": inputs,
        "target": target,
        "ntokens": int(target.ne(PAD).sum()),
        "alignments": torch.tensor(links),
        "align_weights": torch.tensor([1.0, 0.5, 2.0]),
    }


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(("layer", "heads"), [(None, None), (0, 1)])
def test_guided_alignment_trains_as_stock_does(left, layer, heads):
    """label_smoothed_cross_entropy_with_alignment ended in "'NoneType' object has no attribute 'shape'" here."""
    its_task = task(VOCAB)
    stored = argparse.Namespace(**SIZES, alignment_layer=1 if layer is None else layer, alignment_heads=heads)
    torch.manual_seed(3)
    stock = TransformerAlignModel.build_model(copy.deepcopy(stored), its_task)
    stored.alignment_layer = layer
    its_task.cfg.load_alignments = True
    torch.manual_seed(3)
    ours = PrunedTransformerModel.build_model(stored, its_task)  # a Namespace without the fields of this plugin
    ours.load_state_dict(stock.state_dict())
    ours.set_masks(all_ones(ours))
    criterion_task = argparse.Namespace(target_dictionary=VOCAB, source_dictionary=VOCAB)
    criterion = LabelSmoothedCrossEntropyCriterionWithAlignment(criterion_task, True, 0.1, 0.5)
    sample = sentences(left)
    found = {}
    for model in (stock, ours):
        model.train()
        loss, _, logged = criterion(model, sample)
        loss.backward()
        assert logged["alignment_loss"] > 0
        found[model] = loss.detach(), {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(*[loss for loss, _ in found.values()])
    (_, expected), (_, gradients) = found.values()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)


def test_links_to_pruned_cells_add_no_gradient():
    """The logarithm of their probability, 0, would be -inf and its gradient NaN."""
    its_task = task(VOCAB)
    its_task.cfg.load_alignments = True
    model = PrunedTransformerModel.build_model(PrunedTransformerConfig(**SIZES), its_task)
    model.set_masks(random_masks(0.6, longest=(7, 8)))
    model.train()
    weights = model(**sentences(left=True)["net_input"])[1]["attn"][0]
    assert (weights > 0).all() and (weights < 1e-30).any()
    weights.log().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert any(x.any() for x in gradients) and all(x.isfinite().all() for x in gradients)


def test_alignments_of_a_converted_model_are_those_of_its_layer_and_heads():
    stored = argparse.Namespace(**SIZES, alignment_layer=0, alignment_heads=1)
    stock = TransformerAlignModel.build_model(copy.deepcopy(stored), task(VOCAB)).eval()
    options = pruned_options("transformer_align", TransformerAlignModel, stored)
    options.pop("_name")
    ours = PrunedTransformerModel.build_model(PrunedTransformerConfig(**options), task(VOCAB)).eval()
    ours.load_state_dict(stock.state_dict())
    ours.set_masks(all_ones(ours))
    inputs = sentences(left=True)["net_input"]
    assert ours(**inputs)[1]["attn"] == [None]  # nobody reads them
    expected = stock(**inputs)[1]["attn"][0]
    ours.decoder.alignment_needed = True  # as while fairseq scores or generates with alignments
    for training in (False, True):
        found = ours.train(training)(**inputs)[1]["attn"][0]
        real = inputs["prev_output_tokens"].ne(PAD)
        torch.testing.assert_close(found[real], expected[real])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alignment_layer": 2}, "--alignment-layer 2: the decoder of this model has 0 to 1"),
        ({"alignment_heads": 3}, "--alignment-heads 3: the decoder of this model has 1 to 2"),
    ],
)
def test_alignments_of_what_the_model_has_not_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        pruned_model(**options)


def test_sharded_training_is_refused_when_the_model_is_built(monkeypatch):
    """--ddp-backend fully_sharded wraps layers while fairseq builds the model."""
    from fairseq import distributed

    monkeypatch.setattr(distributed, "fsdp_wrap", lambda module, **kwargs: torch.nn.Sequential(module))
    with pytest.raises(UserError, match="--ddp-backend fully_sharded"):
        pruned_model()


@pytest.mark.parametrize(
    "part",
    ["", "encoder", "decoder", "encoder.layers.0", "decoder.layers.0", "decoder.layers.1.encoder_attn", "export"],
)
def test_torchscript_is_refused_in_one_sentence(part):
    """Layers and attention modules, scripted alone as fairseq's tests do, failed with torch's own error."""
    model = pruned_model(random_masks(0.5))
    with pytest.raises(UserError, match="cannot be compiled with TorchScript"):
        if part == "export":
            model.prepare_for_onnx_export_()
        else:
            torch.jit.script(model.get_submodule(part))


def test_a_model_without_masks_says_so_before_its_first_batch():
    """fairseq asks for the positions of a model before it trains, validates or translates."""
    with pytest.raises(UserError, match="has no masks: start training with --attention-masks FILE"):
        pruned_model().max_positions()
    assert pruned_model(random_masks(0.5)).max_positions() == (1024, 1024)


def test_damaged_checkpoints_are_named_with_what_is_wrong(dense, data_bin, masks_file, tmp_path):
    """Torch's advice to unpickle what its safe loader refuses was passed on; damage inside was a traceback."""
    weight = "decoder.layers.1.fc1.weight"
    pointer = tmp_path / "pointer.pt"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    text = tmp_path / "text.pt"
    text.write_text("no checkpoint")
    changes = {
        "has no 'task'": lambda state: state["cfg"].pop("task"),
        "entry 'model' is a list": lambda state: state.update(model=[]),
        f"parameter {weight} is a str": lambda state: state["model"].update({weight: "x"}),
        f"Missing key.*{weight}": lambda state: state["model"].pop(weight),
        f"size mismatch for {weight}": lambda state: state["model"].update({weight: torch.zeros(3)}),
    }
    files = [
        (changed_checkpoint(dense, tmp_path / f"{k}.pt", change), message)
        for k, (message, change) in enumerate(changes.items())
    ]
    for path, message in [*files, (pointer, "Git LFS pointer"), (text, "cannot be read as a checkpoint")]:
        with pytest.raises(ArtifactError, match=rf"{path.name}.*{message}") as error:
            apply_masks(path, masks_file, tmp_path / "out.pt", str(data_bin))
        assert "weights_only" not in str(error.value) and "\n" not in str(error.value)
        assert not (tmp_path / "out.pt").exists()


def test_masks_of_none_keep_every_cell_of_a_pruned_checkpoint_too(dense, data_bin, masks_file, tmp_path):
    first, second = tmp_path / "half.pt", tmp_path / "none.pt"
    apply_masks(dense, masks_file, first, str(data_bin))
    provenance = apply_masks(first, "none", second, str(data_bin))
    assert provenance["sparsity"]["cross"]["effective"] == 0
    masks = load_checkpoint(second)["model"]
    assert masks["decoder.layers.0.encoder_attn.mask_range"].tolist() == [1, 1]


def test_ap_apply_says_once_how_much_is_pruned(dense, data_bin, masks_file, tmp_path):
    """Three lines did: of the file, of the model, of the checkpoint."""
    log = run("ap-apply", dense, "--attention-masks", masks_file, "--data", data_bin, "-o", tmp_path / "half.pt")
    assert log.count("effective sparsity") == 1 and f"masks {masks_file}: effective sparsity" in log


# -- back to fairseq's own transformer --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transformer", "transformer_wmt_en_de_big_t2t", "transformer_align"])
def test_a_model_comes_back_from_pruned_options(name):
    """Sizes, layer normalisation before or after, alignment heads: the class, the parameters and the function."""
    given = argparse.Namespace(arch=name, _name=name, **SIZES, layernorm_embedding=True, alignment_heads=1)
    ARCH_CONFIG_REGISTRY[name](given)
    stock = build_model(copy.deepcopy(given), task(VOCAB)).eval()
    if name != "transformer_align":
        del given.alignment_heads
    cfg = {
        "model": pruned_options(name, ARCH_MODEL_REGISTRY[name], given),
        "task": {"_name": "pruned_translation", "source_lang": "en", "prune_start": 7},
    }
    options = stock_options(cfg)
    assert (options.task, options.source_lang, hasattr(options, "prune_start")) == ("translation", "en", False)
    back = build_model(options, task(VOCAB)).eval()
    assert type(back) is (TransformerAlignModel if name == "transformer_align" else ARCH_MODEL_REGISTRY["transformer"])
    back.load_state_dict(stock.state_dict(), strict=True)
    inputs = sentences(left=True)["net_input"]
    assert torch.equal(back(**inputs)[0], stock(**inputs)[0])
    assert getattr(back.decoder, "alignment_heads", None) == getattr(stock.decoder, "alignment_heads", None)


def test_stock_fairseq_reads_what_to_stock_writes(dense, data_bin, masks_file, tmp_path):
    """Translations are those of the dense checkpoint, without the plugin. Torch refuses fairseq's options from 2.6 on,
    in this file as in those of fairseq-train, unless the plugin or the variable allows them."""
    ones, stock = tmp_path / "ones.pt", tmp_path / "stock.pt"
    run("ap-apply", dense, "--attention-masks", "none", "-o", ones)
    run("python", "-m", "ap_fairseq.cli.apply", ones, "--to-stock", "-o", stock)
    log = run_process(
        *["fairseq-generate", data_bin, "--path", stock, "--cpu", "--beam", 3, "--max-tokens", 1500],
        *["--required-batch-size-multiple", 1, "--gen-subset", "valid"],
        environment={"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
    )
    lines, expected = (
        re.findall(r"^(?:[STHDP]-|Generate ).*$", text, re.MULTILINE)
        for text in (log, generate(data_bin, dense, subset="valid"))
    )
    assert lines == expected and len(lines) == 60 * 5 + 1


def test_ctranslate2_translates_what_to_stock_writes(dense, data_bin, tmp_path):
    """Greedily, to the hypotheses of fairseq for the dense checkpoint."""
    ctranslate2 = pytest.importorskip("ctranslate2", reason="pip install ctranslate2")
    from ctranslate2.converters import FairseqConverter

    apply_masks(dense, "none", tmp_path / "ones.pt", str(data_bin))
    convert_to_stock(tmp_path / "ones.pt", tmp_path / "stock.pt")
    model = FairseqConverter(str(tmp_path / "stock.pt"), str(data_bin), unsafe_deserialization=True)
    model.convert(str(tmp_path / "ct2"))
    log = generate(data_bin, dense, "--beam", 1, subset="valid")
    sources = [line.split() for line in re.findall(r"^S-\d+\t(.*)$", log, re.MULTILINE)]
    translated = ctranslate2.Translator(str(tmp_path / "ct2")).translate_batch(sources, beam_size=1)
    hypotheses = [" ".join(result.hypotheses[0]) for result in translated]
    assert hypotheses == re.findall(r"^H-\d+\t\S+\t(.*)$", log, re.MULTILINE) and len(hypotheses) == 60


def test_to_stock_refuses_masks_unless_they_are_dropped(dense, data_bin, masks_file, tmp_path, caplog):
    half, stock = tmp_path / "half.pt", tmp_path / "stock.pt"
    apply_masks(dense, masks_file, half, str(data_bin))
    with pytest.raises(
        ArtifactError,
        match=r"half.pt has masks \(.*cross 50.0%.*\); fairseq's .* drop the masks with --attention-masks none",
    ):
        convert_to_stock(half, stock)
    with pytest.raises(ArtifactError, match="holds a model 'transformer'; --to-stock takes pruned_transformer"):
        convert_to_stock(dense, stock)
    assert not stock.exists()
    convert_to_stock(half, stock, drop_masks=True)
    assert re.search(r"the masks of .*half.pt are dropped: effective sparsity .*cross 50.0%", caplog.text)
    parameters, expected = load_checkpoint(stock)["model"], load_checkpoint(dense)["model"]
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameters[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("where", "cell"), [("keep", (1, 0, 3, 1)), ("extrapolation", (1, 0, 0))])
def test_one_pruned_cell_is_no_dense_model(where, cell):
    """Also if it lies beyond the recorded range."""
    model, masks = pruned_model(), random_masks(0.0)
    model.set_masks(masks)
    require_dense(model, {}, "x.pt")
    getattr(masks, where)[AttentionKind.DECODER_SELF][cell] = False
    model.set_masks(masks)
    with pytest.raises(ArtifactError, match="x.pt has masks"):
        require_dense(model, {}, "x.pt")
    with pytest.raises(ArtifactError, match="--attention-top-k 4, which fairseq's own model cannot do"):
        require_dense(model, {"attention_top_k": "4"}, "x.pt")
