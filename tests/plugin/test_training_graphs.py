"""Updates replayed as CUDA graphs are the updates of fairseq's loop; without a GPU the same passes run directly."""

import contextlib
import copy
import gc

import pytest
import torch
from plugin import builders

from ap_fairseq.model.training_graphs import MOST_GRAPHS, TrainingGraphs, _Graph, rounded
from ap_fairseq.pruning.build import build_masks
from ap_fairseq.pruning.spec import MaskSpec
from ap_fairseq.sites import AttentionKind

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = builders.dictionary()


def sample(source=(9, 5, 3), target=(4, 8, 2), seed=0):
    """Source tokens padded on the left, as fairseq's loader pads them, and right-padded decoder input."""
    parts = (
        builders.batch(source, VOCAB, left=True, seed=seed),
        builders.batch(target, VOCAB, left=False, seed=seed + 1),
    )
    return tuple(part.to(DEVICE) for part in parts)


def relative_masks():
    spec = MaskSpec({AttentionKind.CROSS: 0.4}, granularity="scaled-diagonal")
    return build_masks(builders.random_stats(heads=1), spec).masks


def models(masks=None, **options):
    """A model whose updates are replayed, and the same model without."""
    sizes = dict(encoder_attention_heads=1, decoder_attention_heads=1, share_decoder_input_output_embed=True)
    model = builders.pruned_model(masks or builders.random_masks(0.4, heads=1), vocab=VOCAB, **sizes | options)
    model = model.to(DEVICE).train()
    plain = copy.deepcopy(model)
    plain._use_graphs = False
    model._graphs = TrainingGraphs(model, capture=DEVICE == "cuda")
    return model, plain


def update(model, source, target) -> float:
    """One forward and backward pass; gradients are added to those that are there."""
    logits, _ = model(source, None, target)
    real = target.ne(VOCAB.pad())
    loss = torch.nn.functional.cross_entropy(logits[real].float(), target[real], reduction="sum")
    loss.backward()
    return float(loss.detach())


def assert_same_gradients(model, plain):
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-4, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("masks", [None, relative_masks()], ids=["cells", "relative"])
def test_losses_and_accumulated_gradients_are_those_of_direct_updates(masks):
    """Batches are filled up with sentences without a token."""
    model, plain = models(masks)
    shapes = [
        ((9, 5, 3), (4, 8, 2)),
        ((6, 6, 6, 6, 6), (5, 1, 2, 3, 4)),
        ((9, 5, 3), (4, 8, 2)),
        ((10, 1, 2), (7, 3, 1)),
    ]
    for round_number in range(3):  # direct, captured, replayed
        for seed, (source, target) in enumerate(shapes):
            tokens = sample(source, target, seed + 10 * round_number)
            assert update(model, *tokens) == pytest.approx(update(plain, *tokens), rel=1e-4)
        assert_same_gradients(model, plain)
    assert len(model._graphs.graphs) == 2


def test_weights_may_change_in_place_and_move():
    model, plain = models()
    for step in range(5):
        tokens = sample(seed=step)
        update(model, *tokens)
        update(plain, *tokens)
        assert_same_gradients(model, plain)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            p.data.sub_(0.1 * p.grad)
            q.data.copy_(p.data)
            p.grad = q.grad = None
        if step == 2:
            assert model._graphs.graphs
            for p in model.parameters():
                p.data = p.data.clone()
    assert model._graphs.graphs


def test_other_masks_make_other_graphs():
    model, plain = models()
    for seed in (0, 1):
        for part in (model, plain):
            part.set_masks(builders.random_masks(0.6, seed=seed, heads=1))
            part.zero_grad()
        for _ in range(3):
            tokens = sample()
            assert update(model, *tokens) == pytest.approx(update(plain, *tokens), rel=1e-4)
        assert_same_gradients(model, plain)


def test_a_shape_is_captured_only_with_the_layouts_that_it_ran_on(monkeypatch):
    """Longer sentences of the validation replace layouts: their tables for the backward pass were made in a capture, so
    that they had no content until its first replay, and never any if memory ran out before."""
    model, _ = models()
    captured, tokens = [], sample()
    monkeypatch.setattr(model._graphs, "capture", True)
    monkeypatch.setattr(model._graphs, "_captured", lambda graph: captured.append(graph) or True)
    update(model, *tokens)
    before = model._graphs.layouts()
    with torch.no_grad():
        source, target = sample((90,), (90,))
        model.eval()(source, None, target)
    model.train()
    assert not any(a is b for a, b in zip(before, model._graphs.layouts(), strict=True))
    update(model, *tokens)
    assert not captured
    update(model, *tokens)
    assert captured == list(model._graphs.graphs.values())


def test_a_forward_pass_before_the_backward_pass_of_another_runs_directly():
    model, plain = models()
    tokens = sample()
    for part in (model, plain):
        first, second = part(*tokens[:1], None, tokens[1])[0], part(*tokens[:1], None, tokens[1])[0]
        (first.square().sum() + 2 * second.sum()).backward()
    assert len(model._graphs.graphs) == 1
    assert_same_gradients(model, plain)


def test_a_forward_pass_without_a_backward_pass_does_not_block_the_next():
    model, _ = models()
    tokens = sample()
    abandoned = model(tokens[0], None, tokens[1])[0]
    assert model._graphs._is_pending()
    del abandoned
    gc.collect()
    assert not model._graphs._is_pending()


def test_a_second_backward_pass_is_an_error_not_a_wrong_gradient():
    model, _ = models()
    tokens = sample()
    loss = model(tokens[0], None, tokens[1])[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass.*--cuda-graphs off"):
        loss.backward()


def test_gradients_reach_data_parallel_training(tmp_path):
    model, plain = models()
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for step in range(4):
            tokens = sample(seed=step)
            with parallel.no_sync() if step == 2 else contextlib.nullcontext():  # --update-freq
                update(parallel, *tokens)
            update(plain, *tokens)
        assert_same_gradients(model, plain)
    finally:
        torch.distributed.destroy_process_group()


def test_evaluation_and_frozen_gradients_run_directly():
    model, plain = models()
    tokens = sample()
    for part in (model, plain):
        part.eval()
    for _ in range(2):
        torch.testing.assert_close(model(tokens[0], None, tokens[1])[0], plain(tokens[0], None, tokens[1])[0])
    model.train()
    with torch.no_grad():
        model(tokens[0], None, tokens[1])
    assert not model._graphs.graphs


@pytest.mark.parametrize(
    "options", [{"encoder_layerdrop": 0.1}, {"checkpoint_activations": True}, {"cuda_graphs": "off"}], ids=str
)
def test_what_cannot_be_captured_runs_directly(options):
    model = builders.pruned_model(builders.random_masks(0.4), vocab=VOCAB, **options).to(DEVICE).train()
    for _ in range(3):
        update(model, *sample())
    assert model._graphs is None


def test_without_memory_for_a_graph_updates_go_on_directly(monkeypatch, caplog):
    def capture(graph):
        raise torch.cuda.OutOfMemoryError("out of memory")

    model, plain = models()
    model._graphs.capture = True
    monkeypatch.setattr(_Graph, "capture", capture)
    for step in range(4):
        tokens = sample(seed=step)
        assert update(model, *tokens) == pytest.approx(update(plain, *tokens), rel=1e-4)
    assert_same_gradients(model, plain)
    assert not model._graphs.graphs and model._graphs.gradients is None  # nothing is held for what is not used
    (message,) = caplog.messages
    assert "3 sentences of 12 and 8 tokens could not be captured" in message and "lower --max-tokens" in message

    caplog.clear()
    language_model = builders.language_models(VOCAB)[1].to(DEVICE).train()
    graphs = TrainingGraphs(language_model, capture=True)
    while (features := graphs(None, tokens[1])) is not None:
        features.sum().backward()
    assert "3 blocks of 8 tokens could not be captured" in caplog.messages[-1]


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU: run this file on a machine with one")
def test_replayed_dropout_is_drawn_anew_and_seeded_by_fairseq():
    model, _ = models(dropout=0.3, attention_dropout=0.3)
    tokens = sample()
    losses = []
    for seed in (2, 1, 2, 3, 2):  # direct, captured, replayed
        torch.manual_seed(seed)
        losses.append(update(model, *tokens))
    assert losses[2] == losses[4] == pytest.approx(losses[0], rel=1e-5)
    assert abs(losses[2] - losses[3]) > 1e-3


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU: run this file on a machine with one")
def test_all_shapes_share_the_memory_of_the_largest():
    def reserved(lengths) -> int:
        model, _ = models()
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for length in lengths:
            for _ in range(3):
                update(model, *sample((length,) * 64, (length,) * 64))
        assert all(graph.passes is not None for graph in model._graphs.graphs.values())
        return torch.cuda.memory_reserved() - before

    assert reserved(range(4, 68, 4)) < 2 * reserved([64])


def test_a_position_table_that_has_moved_makes_all_graphs_void():
    """Captured passes would read where the table of shorter sentences was."""
    model, plain = models(max_source_positions=16)
    before = update(model, *sample()), model._graphs.graphs
    with torch.no_grad():
        model.encoder(sample((40,))[0])  # fairseq makes a longer table, as when it translates for --eval-bleu
    assert update(model, *sample()) == pytest.approx(before[0], rel=1e-4)
    assert model._graphs.graphs is not before[1] and len(model._graphs.graphs) == 1


def test_sizes_are_rounded_up_by_at_most_a_sixteenth():
    for n in range(1, 3000):
        for least in (1, 4):
            up = rounded(n, least)
            assert n <= up < n + max(least, n / 16) and rounded(up, least) == up
    assert len({rounded(n, 4) for n in range(1, 1025)}) < 100 < MOST_GRAPHS
