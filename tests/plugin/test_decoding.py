"""Caches hold what a coming mask row keeps, and nothing that is dropped is ever read."""

import logging

import numpy as np
import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from plugin.builders import pruned_model, random_masks
from plugin.hypotheses import assert_same, plain
from plugin.searches import DEVICE, SIZES, VOCAB, sample

from ap_fairseq.artifacts import PruningMasks
from ap_fairseq.files import UserError
from ap_fairseq.model import kv_cache
from ap_fairseq.model.kv_cache import CrossAttentionCache, SelfAttentionCache, limit_steps, peak_share
from ap_fairseq.search import static_decoder
from ap_fairseq.search.generator import PrunedSequenceGenerator
from ap_fairseq.sites import AttentionKind, attention_sites

STEPS, SOURCE = 48, 12


def masks(window: int | None) -> PruningMasks:
    """Self-attention to the last *window* tokens, except that head 1 of layer 1 also keeps column 3 for ever.

    Cross-attention of head 0 keeps column 0 only, that of head 1 the first five columns; without a window all is kept.
    """
    row, column = np.arange(STEPS)[:, None], np.arange(STEPS)
    causal = column <= row
    keep = {
        AttentionKind.ENCODER_SELF: np.ones((2, 2, SOURCE, SOURCE), dtype=bool),
        AttentionKind.DECODER_SELF: np.broadcast_to(causal, (2, 2, STEPS, STEPS)).copy(),
        AttentionKind.CROSS: np.ones((2, 2, STEPS, SOURCE), dtype=bool),
    }
    if window is not None:
        keep[AttentionKind.DECODER_SELF] &= column > row - window
        keep[AttentionKind.DECODER_SELF][1, 1, 3:, 3] = True
        keep[AttentionKind.CROSS][:, 0, :, 1:] = False
        keep[AttentionKind.CROSS][:, 1, :, 5:] = False
    extrapolation = {kind: np.ones((2, 2, sum(cells.shape[2:]) - 1), dtype=bool) for kind, cells in keep.items()}
    return PruningMasks(keep, extrapolation)


def model(pruning_masks: PruningMasks, **options):
    made = pruned_model(pruning_masks, VOCAB, max_target_positions=STEPS, **SIZES, **options)
    made.decoder.output_projection.weight.data.mul_(3)
    return made.to(DEVICE)


@pytest.fixture
def caches(monkeypatch):
    """Caches that are full after two positions, whose dropped rows hold NaN. Collects the size of every pool."""
    sizes = []
    real = kv_cache.compact

    def poisoned(pool, offsets, live, readable, n_new, n_steps=None):
        pool, used = real(pool, offsets, live, readable, n_new, n_steps)
        pool[used:] = torch.nan
        offsets.masked_fill_(~readable, used)
        sizes.append(pool.size(0))
        return pool, used

    for module in (kv_cache, static_decoder):
        monkeypatch.setattr(module, "compact", poisoned)
        monkeypatch.setattr(module, "INITIAL_CAPACITY", 2)
    # A CPU without kernels searches over other caches.
    monkeypatch.setattr(PrunedSequenceGenerator, "_decoder_class", lambda self, device: static_decoder.StaticDecoder)
    return sizes


OPTIONS = dict(beam_size=3, max_len_b=40, min_len=38)
MASKS = [
    lambda: masks(4),
    lambda: random_masks(0.7, longest=(STEPS, SOURCE)),
    lambda: random_masks(0.9, longest=(STEPS, SOURCE), empty_rows=True),
]


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("generator", [SequenceGenerator, PrunedSequenceGenerator])
@pytest.mark.parametrize("make", MASKS)
def test_pruned_caches_give_the_results_of_caches_that_keep_all(generator, backend, make, caches):
    system = model(make(), attention_backend=backend)
    lengths = [5, 12, 1, 9, 3] if backend == "sdpa" or DEVICE == "cuda" else [5, 2]  # the interpreter is slow
    options = OPTIONS if len(lengths) > 2 else dict(beam_size=2, max_len_b=12, min_len=10)
    ours = generator([system], VOCAB, **options).generate([], sample(lengths))
    assert caches
    for _, module in attention_sites(system):
        module.max_steps = None
    assert_same(ours, SequenceGenerator([system], VOCAB, **options).generate([], sample(lengths)))
    assert all(torch.isfinite(scores).all() for hypotheses in plain(ours) for _, _, scores in hypotheses)


@pytest.mark.parametrize("generator", [SequenceGenerator, PrunedSequenceGenerator])
def test_memory_is_bounded_under_a_window_and_grows_when_all_is_kept(generator, caches):
    def largest(pruning_masks):
        caches.clear()
        generator([model(pruning_masks)], VOCAB, **OPTIONS).generate([], sample([5, 12, 3, 9]))
        return max(caches)

    heads, hypotheses, window = 2, 4 * 3, 4
    assert largest(masks(window)) <= 3 * (window + 1) * heads * hypotheses  # twice what is alive, and one step
    kept = largest(masks(None))
    assert kept >= OPTIONS["max_len_b"] * heads * 4  # a row for each position, unless beams share it
    if generator is PrunedSequenceGenerator:  # which knows how many steps may come; the last doubling would exceed that
        assert kept <= (OPTIONS["max_len_b"] + 1) * heads * hypotheses


def test_columns_that_no_row_keeps_are_neither_projected_nor_stored():
    module = next(m for (kind, _), m in attention_sites(model(masks(4))) if kind is AttentionKind.CROSS)
    stored = module.last_use(STEPS, SOURCE) >= 0
    assert stored.sum(1).tolist() == [1, 5]
    lengths = torch.tensor([12, 3, 5], device=DEVICE)
    padding = torch.arange(SOURCE, device=DEVICE) >= lengths[:, None]
    source = torch.randn(SOURCE, 3, 32, device=DEVICE)
    poisoned = source.clone()
    poisoned[5:] = torch.nan
    poisoned.transpose(0, 1)[padding] = torch.nan
    projected = []

    def project(rows):
        projected.append(rows.size(0))
        return module.project_source(rows)

    cache = CrossAttentionCache.from_encoder_output(project, stored, poisoned, padding, 3, STEPS)
    assert projected == [5 + 3 + 5] and cache.pool.size(0) == 3 * 1 + 5 + 3 + 5
    keep = module.keep_mask(1, SOURCE)[:, 0]
    k, v, _ = cache.dense(keep)
    assert torch.isfinite(k).all() and torch.isfinite(v).all()
    expected = module.project_source(source.flatten(0, 1)).unflatten(0, (SOURCE, 3)).permute(2, 1, 3, 0, 4)
    read = keep & ~padding[:, None]
    torch.testing.assert_close(k[read], expected[0][read])
    torch.testing.assert_close(v[read], expected[1][read])


def test_a_step_beyond_what_the_caches_were_made_for_is_refused():
    module = next(m for (kind, _), m in attention_sites(model(masks(4))) if kind is AttentionKind.DECODER_SELF)
    state = {}
    limit_steps(state, 2)
    query = torch.randn(1, 3, 32, device=DEVICE)
    for _ in range(2):
        module(query, incremental_state=state, need_weights=False)
    with pytest.raises(UserError, match="step 2 of a search of at most 2 steps"):
        module(query, incremental_state=state, need_weights=False)


def test_a_search_of_few_steps_keeps_only_the_source_columns_of_their_mask_rows(monkeypatch):
    """The bound travels with the incremental state of the search; the modules of the model stay as they are."""
    keep = masks(4)
    keep.keep[AttentionKind.CROSS][:, :, :12, 1:] = False
    keep.keep[AttentionKind.CROSS][:, :, 12:] = True
    system, stored = model(keep), []
    real = CrossAttentionCache.from_encoder_output
    monkeypatch.setattr(
        CrossAttentionCache, "from_encoder_output", lambda *args: stored.append(args[1].sum().item()) or real(*args)
    )
    monkeypatch.setattr(PrunedSequenceGenerator, "fallback_reason", lambda *args: "fairseq's own loop, on a GPU too")
    for max_len, columns in ((10, 1), (20, SOURCE)):
        search = PrunedSequenceGenerator([system], VOCAB, beam_size=2, max_len_b=max_len)
        search.generate([], sample([SOURCE, 3]))
        assert stored == [2 * columns] * 2  # of two heads, in two layers
        stored.clear()


def test_beams_that_share_a_prefix_share_its_rows():
    """Of three hypotheses that all continue the first, one row per head and position is live."""
    cache = SelfAttentionCache.empty_like(torch.zeros(3, 2, 2, 4), None, max_steps=None)
    for step in range(kv_cache.INITIAL_CAPACITY):
        cache.advance(torch.full((3, 2, 2, 4), float(step)) + torch.arange(3)[:, None, None, None] / 10)
        cache.reorder(torch.tensor([1, 1, 1]))
    cache.advance(torch.zeros(3, 2, 2, 4))
    assert cache.used == 2 * (kv_cache.INITIAL_CAPACITY + 3)
    k, _, _ = cache.dense(torch.ones(2, cache.n_columns(), dtype=torch.bool))
    expected = torch.tensor([step + 0.1 for step in range(kv_cache.INITIAL_CAPACITY)] + [0.0])
    torch.testing.assert_close(k, expected[:, None].expand(3, 2, -1, 4))


def test_the_share_that_is_alive_is_counted_step_by_step():
    keep = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(1)) < 0.06
    keep = keep.tril() | torch.eye(20, dtype=torch.bool)
    steps = [int(keep[:, :, t:, : t + 1].any(2).sum()) for t in range(20)]
    last = [20 - 1 - site.flip(1).int().argmax(1) for site in keep]
    assert peak_share(last) == (max(steps), 2 * 3 * 20)


def test_the_rule_and_its_saving_are_logged_at_the_start(caplog):
    from omegaconf import OmegaConf

    system = model(masks(4))
    with caplog.at_level(logging.INFO, "ap_fairseq.model.transformer"):
        system.prepare_for_inference_(OmegaConf.create({"generation": {}}))
    (line,) = [record.message for record in caplog.records if "caches hold" in record.message]
    # A window of 4 in 4 heads, and column 3 of one head; of two heads in two layers 1 and 5 of 12 columns.
    assert f"at most 17 of {4 * STEPS} positions" in line and f"12 of {4 * SOURCE} source columns" in line
    assert "(91.1% less)" in line and "(75.0% less)" in line


def test_masks_that_prune_nothing_have_no_saving_to_log(caplog):
    """To find that out took a third of a second of the start on a GPU."""
    with caplog.at_level(logging.INFO, "ap_fairseq.model.transformer"):
        model(random_masks(0.0)).log_cache_savings()
    assert "caches hold" not in caplog.text
