"""Dense checkpoints of every kind become pruned ones that compute the same, or are refused by name."""

import argparse
import copy

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy_with_alignment import (
    LabelSmoothedCrossEntropyCriterionWithAlignment,
)
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.models.transformer import TransformerModelBase
from fairseq.models.transformer_align import TransformerAlignModel
from plugin.builders import SIZES, batch, dictionary, pruned_model, random_masks, task

from ap_fairseq.artifacts import PruningMasks
from ap_fairseq.files import ArtifactError, UserError
from ap_fairseq.model.checkpoints import INITIALISATION, apply_masks, load_checkpoint, pruned_options
from ap_fairseq.model.config import PrunedTransformerConfig
from ap_fairseq.model.transformer import PrunedTransformerModel
from ap_fairseq.sites import architecture

VOCAB = dictionary()
PAD = VOCAB.pad()
TRANSFORMERS = [
    name
    for name, model in ARCH_MODEL_REGISTRY.items()
    if name.startswith("transformer") and issubclass(model, TransformerModelBase)
]
REFUSED = {"full_context_alignment"}


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
    model.set_masks(random_masks(0.9, longest=(7, 8)))
    model.train()
    weights = model(**sentences(left=True)["net_input"])[1]["attn"][0]
    assert (weights > 0).all() and (weights < 1e-30).any()
    weights.log().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


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


def damaged(path, output, change):
    state = load_checkpoint(path)
    change(state)
    torch.save(state, output)
    return output


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
        (damaged(dense, tmp_path / f"{k}.pt", change), message) for k, (message, change) in enumerate(changes.items())
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
