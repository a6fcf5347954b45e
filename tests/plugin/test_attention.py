"""Pruned attention computes what its mask says: full forward, step by step, padded, reordered, beyond its range."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import merge_with_parent
from omegaconf import OmegaConf
from plugin.builders import batch, dense_model, dictionary, pruned_model, random_masks

from ap_fairseq.artifacts import PruningMasks
from ap_fairseq.files import ArtifactError, UserError
from ap_fairseq.model.attention import PrunedMultiheadAttention
from ap_fairseq.model.config import PrunedTransformerConfig
from ap_fairseq.model.layers import left_padding, rotate_left
from ap_fairseq.provenance import dictionary_sha256
from ap_fairseq.sites import AttentionKind, attention_sites

VOCAB = dictionary()
PAD, EOS = VOCAB.pad(), VOCAB.eos()
KINDS = tuple(AttentionKind)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


EMPTY_ROWS = random_masks(0.9, longest=(12, 12), empty_rows=True)


def guarantee_only() -> PruningMasks:
    """Masks that forbid everything but the guaranteed cell of each row."""
    masks = random_masks(0.0, longest=(12, 12))
    for kind in KINDS:
        masks.keep[kind][:] = False
        masks.extrapolation[kind][:] = False
        if kind is AttentionKind.CROSS:
            masks.keep[kind][..., 0] = True
        else:
            masks.keep[kind][..., range(12), range(12)] = True
    return PruningMasks(masks.keep, masks.extrapolation)


def targets(lengths, seed=2):
    rows = batch(lengths, VOCAB, left=False, seed=seed)
    rows[:, 0] = EOS
    return rows


def translate(model, source, target):
    """Teacher-forced output: (B, T, vocabulary)."""
    with torch.no_grad():
        return model(source, source.ne(PAD).sum(1), target)[0]


def naive(module, query, key, padding=None):
    """Attention with explicit loops in float64: query (Tq, B, C), key (Tk, B, C) -> (Tq, B, C)."""
    n_queries, n_batch, _ = query.shape
    keep = module.keep_mask(n_queries, key.size(0))
    q, k, v = (proj(x).double() for proj, x in ((module.q_proj, query), (module.k_proj, key), (module.v_proj, key)))
    output = torch.zeros_like(q)
    for b in range(n_batch):
        for h in range(module.num_heads):
            part = slice(h * module.head_dim, (h + 1) * module.head_dim)
            for i in range(n_queries):
                columns = [
                    j for j in range(key.size(0)) if keep[h, i, j] and not (padding is not None and padding[b, j])
                ]
                if columns:
                    scores = torch.stack([q[i, b, part] @ k[j, b, part] for j in columns]) / module.head_dim**0.5
                    output[i, b, part] = scores.softmax(0) @ v[columns, b, part]
    return module.out_proj.double()(output)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masks", [random_masks(0.6), EMPTY_ROWS], ids=["guaranteed", "empty rows"])
def test_full_forward_equals_a_loop_over_kept_cells(masks, kind, need_weights):
    module = dict(attention_sites(pruned_model(masks, VOCAB)))[kind, 1]
    query = torch.randn(7, 2, 16, generator=torch.Generator().manual_seed(0))
    key = torch.randn(9, 2, 16, generator=torch.Generator().manual_seed(1)) if kind is AttentionKind.CROSS else query
    causal = torch.full((7, 7), float("-inf")).triu(1) if kind.causal else None
    with torch.no_grad():
        ours, weights = module(query, key, key, attn_mask=causal, need_weights=need_weights)
        expected = naive(module, query, key)
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=1e-5)
    assert (weights is not None) == need_weights
    if need_weights:
        assert weights.shape == (2, 7, key.size(0))


def test_an_all_ones_mask_is_stock_fairseq():
    """Same seed, same parameters, same outputs as fairseq's own model; padding on the left as fairseq does."""
    stock, ours = dense_model(VOCAB), pruned_model(random_masks(0.0), VOCAB)
    for (name, a), (other, b) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    source, target = batch([5, 2, 7], VOCAB, left=True), targets([4, 6, 3])
    real = target.ne(PAD)
    torch.testing.assert_close(
        translate(ours, source, target)[real], translate(stock, source, target)[real], atol=1e-5, rtol=1e-5
    )


def test_left_and_right_padding_of_the_source_are_the_same():
    model = pruned_model(random_masks(0.7), VOCAB)
    lengths, target = [5, 2, 7], targets([4, 6, 3])
    left, right = (translate(model, batch(lengths, VOCAB, left=side), target) for side in (True, False))
    real = target.ne(PAD)
    torch.testing.assert_close(left[real], right[real])


def test_a_sentence_translates_alone_as_in_a_batch():
    """The authors' masks were indexed by padded columns, so results depended on the neighbours in the batch."""
    model = pruned_model(random_masks(0.7), VOCAB)
    source, target = batch([5, 2, 7], VOCAB, left=True), targets([4, 6, 3])
    together = translate(model, source, target)
    for k, (s, t) in enumerate(zip([5, 2, 7], [4, 6, 3], strict=True)):
        alone = translate(model, source[k : k + 1, -s:], target[k : k + 1, :t])
        torch.testing.assert_close(together[k : k + 1, :t], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("empty_rows", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_incremental_decoding_equals_teacher_forcing(kind, empty_rows):
    """The authors' code read mask row source length + 1 in every step, so BLEU was that of another mask."""
    model = pruned_model(random_masks(0.7, kinds=(kind,), longest=(12, 12), empty_rows=empty_rows), VOCAB)
    source, target = batch([5, 2, 7], VOCAB, left=True), targets([8, 8, 8])
    full = translate(model, source, target)
    encoder_out, state = model.encoder(source), {}
    for step in range(target.size(1)):
        with torch.no_grad():
            now = model.decoder(target[:, : step + 1], encoder_out=encoder_out, incremental_state=state)[0]
        torch.testing.assert_close(now[:, 0], full[:, step], atol=1e-5, rtol=1e-5)


def test_reordered_beams_and_finished_sentences_keep_their_own_rows():
    """BeamSearchState swap parents at step 3; at step 5 a sentence leaves the batch."""
    model = pruned_model(random_masks(0.7, longest=(12, 12)), VOCAB)
    source, beams = batch([5, 2, 7], VOCAB, left=True), 2
    source = source.repeat_interleave(beams, 0)
    prefixes, tokens = targets([8] * 6, seed=4), targets([8] * 6, seed=5)
    tokens[:, :3] = prefixes[:, :3]
    encoder_out, state = model.encoder(source), {}
    reorder = {3: torch.tensor([1, 0, 2, 2, 5, 4]), 5: torch.tensor([0, 1, 5, 4])}
    for step in range(8):
        if step in reorder:
            order = reorder[step]
            tokens = torch.cat([tokens[order, :step], tokens[order, step:]], 1)
            source = source[order]
            model.decoder.reorder_incremental_state_scripting(state, order)
            encoder_out = model.encoder.reorder_encoder_out(encoder_out, order)
        with torch.no_grad():
            now = model.decoder(tokens[:, : step + 1], encoder_out=encoder_out, incremental_state=state)[0]
        full = translate(model, source, tokens[:, : step + 1])
        torch.testing.assert_close(now[:, 0], full[:, step], atol=1e-5, rtol=1e-5)


def test_alignments_come_back_in_the_callers_columns():
    """Column j of the weights must be column j of the source as it was passed in, left padding included."""
    model = pruned_model(random_masks(0.7), VOCAB)
    lengths, target = [5, 2, 7], targets([4, 4, 4])
    assert model(batch(lengths, VOCAB, left=True), None, target)[1]["attn"] == [None]  # nobody reads them in validation
    model.decoder.alignment_needed = True
    weights = {}
    for left in (True, False):
        source = batch(lengths, VOCAB, left=left)
        with torch.no_grad():
            weights[left] = model(source, None, target)[1]["attn"][0]
        assert (weights[left].transpose(1, 2)[source.eq(PAD)] == 0).all()
        torch.testing.assert_close(weights[left].sum(-1), torch.ones(3, 4))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(weights[True][row, :, 7 - length :], weights[False][row, :, :length])


def test_a_mask_of_nothing_but_the_guarantee_trains():
    """Every row has one visible key; padded rows see nothing real. Loss and all gradients must be finite."""
    model = pruned_model(guarantee_only(), VOCAB).train()
    source, target = batch([5, 1, 7], VOCAB, left=True), targets([4, 1, 3])
    logits = model(source, source.ne(PAD).sum(1), target)[0]
    logits[target.ne(PAD)].log_softmax(-1).mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)


def test_padded_queries_are_written_as_zero():
    module = dict(attention_sites(pruned_model(random_masks(0.5), VOCAB)))[AttentionKind.ENCODER_SELF, 0]
    padding = torch.tensor([[False] * 3 + [True] * 2])
    x = torch.randn(5, 1, 16)
    with torch.no_grad():
        for need_weights in (False, True):
            output, _ = module(x, x, x, key_padding_mask=padding, need_weights=need_weights)
            torch.testing.assert_close(output[3:], module.out_proj.bias.expand(2, 1, 16))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_heads_whose_rows_may_be_empty_stay_so_beyond_the_range(kind):
    masks = random_masks(0.95, longest=(12, 12), empty_rows=True)
    masks.extrapolation[kind][:] = False
    masks.keep[kind][:, 0, range(12), range(12)] = True  # the first head of each layer
    for site, module in attention_sites(pruned_model(masks, VOCAB)):
        if site.kind is kind:
            kept = module.keep_mask(16, 16).diagonal(dim1=1, dim2=2)[:, 12:]
            assert kept[0].all() and not kept[1].any()


@pytest.mark.parametrize("n", [12, 13, 40])
def test_positions_beyond_the_range_follow_the_stored_pattern(n):
    masks = random_masks(0.5, longest=(12, 12))
    draw = np.random.default_rng(0)
    for kind in KINDS:
        masks.extrapolation[kind] = draw.random(masks.extrapolation[kind].shape) < 0.3
    for (kind, layer), module in attention_sites(pruned_model(masks, VOCAB)):
        keep = module.keep_mask(n, n).numpy()
        for h in range(2):
            np.testing.assert_array_equal(keep[h, :12, :12], masks.keep[kind][layer, h])
        for h, i, j in [(0, n - 1, 0), (1, n - 1, n - 2), (0, 3, n - 1), (1, n - 1, n - 1), (0, n - 1, 5)]:
            if max(i, j) < 12:
                continue
            known = abs(j - i) < 12
            expected = masks.extrapolation[kind][layer, h, j - i + 11] if known else True  # never observed: kept
            expected |= j == (0 if kind is AttentionKind.CROSS else i)
            expected &= not (kind.causal and j > i)
            assert keep[h, i, j] == expected, (kind, h, i, j)


def test_masks_beyond_the_range_are_built_once_for_either_side(monkeypatch):
    site = next(m for s, m in attention_sites(pruned_model(random_masks(0.5))) if s.kind is AttentionKind.CROSS)
    built = []
    unpack = site._unpack
    monkeypatch.setattr(site, "_unpack", lambda *size: built.append(size) or unpack(*size))
    for size in [(60, 20), (20, 60)] * 3:
        assert site.keep_mask(*size).shape[1:] == size
        assert site.layout(*size).q_size >= size[0] and site.layout(*size).k_size >= size[1]
    assert built == [(60, 20), (64, 60)]


def test_modules_that_keep_everything_share_a_layout():
    """Each of eighteen built its own, and its tables, again for every length that doubled."""
    shape = {kind.value: list(cells.shape[:2]) for kind, cells in random_masks(0.5).keep.items()}
    model = pruned_model(PruningMasks.all_ones(shape, {}), VOCAB)
    for lengths in ([5, 3], [20, 7]):
        translate(model, batch(lengths, VOCAB, False), targets(lengths))
    layouts = {}
    for site, module in attention_sites(model):
        layouts.setdefault(site.kind, set()).add(module.built_layout)
        assert module.keeps_all(9, 9)
    assert [len(shared) for shared in layouts.values()] == [1, 1, 1]


def test_a_model_without_masks_refuses_to_run():
    """A missing mask must never be a silent dense run (the authors' code trained dense when the file was missing)."""
    model = pruned_model(None, VOCAB)
    with pytest.raises(ArtifactError, match="no masks for its encoder_self attention: start training with"):
        translate(model, batch([3], VOCAB, False), targets([3]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(quant_noise_pq=0.1), "--quant-noise-pq is set"),
        (dict(quant_noise_scalar=0.1), "--quant-noise-scalar 0.1: fairseq would quantise layers"),
        (dict(encoder_xformers_att_config="{'name': 'x'}"), "xformers-att-config is set"),
        (dict(attention_backend="triton"), "--attention-backend triton"),
    ],
)
def test_unsupported_options_are_refused_when_the_model_is_built(options, message):
    with pytest.raises(UserError, match=message):
        pruned_model(None, VOCAB, **options)


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_extra_keys_are_refused(option):
    with pytest.raises(UserError, match=f"{option} is set"):
        PrunedMultiheadAttention(16, 2, kind=AttentionKind.DECODER_SELF, **{option: True})


def test_full_context_decoding_is_refused():
    model = pruned_model(random_masks(0.5), VOCAB)
    with pytest.raises(ValueError, match="decoder_self attention needs an attn_mask"):
        model.decoder(targets([3]), encoder_out=model.encoder(batch([3], VOCAB, False)), full_context_alignment=True)


def test_rotation_moves_padding_between_the_sides():
    left = batch([5, 2, 7], VOCAB, left=True)
    shift = left_padding(left, PAD)
    assert shift.tolist() == [2, 5, 0]
    right = rotate_left(left, shift)
    torch.testing.assert_close(right, batch([5, 2, 7], VOCAB, left=False))
    torch.testing.assert_close(rotate_left(right, -shift), left)


def test_activation_checkpointing_gives_the_same_gradients():
    source, target = batch([5, 2, 7], VOCAB, left=True), targets([4, 6, 3])
    gradients = []
    for checkpoint in (False, True):
        model = pruned_model(random_masks(0.5), VOCAB, checkpoint_activations=checkpoint).train()
        model(source, source.ne(PAD).sum(1), target)[0][target.ne(PAD)].log_softmax(-1).mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_masks_for_another_model_or_dictionary_stop_the_build(tmp_path):
    masks = random_masks(0.5)
    sha = dictionary_sha256(VOCAB)
    masks.metadata["dictionaries"] = {"source": sha, "target": sha}
    path = tmp_path / "m.safetensors"
    masks.save(path)
    assert pruned_model(None, VOCAB, attention_masks=str(path)).masks_provenance() is not None
    with pytest.raises(ArtifactError, match="encoder_self 2 layers x 2 heads.*the model has encoder_self 3 layers x 2"):
        pruned_model(None, VOCAB, attention_masks=str(path), encoder_layers=3)
    with pytest.raises(ArtifactError, match="belong to a source dictionary with SHA-256"):
        pruned_model(None, dictionary(21), attention_masks=str(path))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="m.safetensors cannot be read as a safetensors file"):
        pruned_model(None, VOCAB, attention_masks=str(path))


@pytest.mark.parametrize("n_words", [20, 21])
def test_a_checkpoint_whose_masks_are_of_another_dictionary_is_refused(n_words, caplog):
    """One of as many words translated and trained on silently; of more, torch compared sizes of embeddings."""
    masks, sha = random_masks(0.5), dictionary_sha256(VOCAB)
    masks.metadata["dictionaries"] = {"source": sha, "target": sha}
    state = pruned_model(masks, VOCAB).state_dict()
    pruned_model(None, VOCAB).load_state_dict(state)
    other = dictionary(n_words)
    other.symbols.reverse()
    for start in ({}, dict(attention_masks="none")):
        with pytest.raises(
            ArtifactError, match=f"belongs to a source dictionary .* {sha[:12]}.*name its own data-bin, or"
        ):
            pruned_model(None, other, **start).load_state_dict(state)
    if n_words == 20:
        dense = pruned_model(None, VOCAB, attention_masks="none").state_dict()
        pruned_model(None, other).load_state_dict(dense)
        assert "the checkpoint belongs to a source dictionary" in caplog.text


def test_masks_of_another_number_of_heads_are_refused_with_the_checkpoint():
    """--model-overrides may change the heads: a ValueError of the first batch named a layout."""
    state = pruned_model(random_masks(0.5), VOCAB).state_dict()
    other = pruned_model(None, VOCAB, encoder_attention_heads=4)
    message = r"encoder.layers.0.self_attn.keep_words has shape \(2, 11, 1\), .* has 4 heads"
    with pytest.raises(ArtifactError, match=message):
        other.load_state_dict(state)


def test_an_explicit_file_outlives_a_loaded_checkpoint_and_a_dense_one_gets_it():
    explicit, other = pruned_model(random_masks(0.3, seed=1), VOCAB), pruned_model(random_masks(0.6, seed=2), VOCAB)
    expected = explicit.masks_sha256()
    explicit.load_state_dict(other.state_dict())
    assert explicit.masks_sha256() == expected != other.masks_sha256()
    explicit.load_state_dict(dense_model(VOCAB).state_dict())
    assert explicit.masks_sha256() == expected
    fresh = pruned_model(None, VOCAB)
    fresh.load_state_dict(other.state_dict())
    assert fresh.masks_sha256() == other.masks_sha256()


def test_masks_mixed_by_averaging_are_refused():
    """fairseq's averaging script adds integer buffers and floor-divides; different masks give words of neither."""
    one, two = (pruned_model(random_masks(0.5, seed=seed), VOCAB).state_dict() for seed in (1, 2))
    same = {k: torch.div(v + v, 2, rounding_mode="floor") if not v.is_floating_point() else v for k, v in one.items()}
    pruned_model(None, VOCAB).load_state_dict(same)
    mixed = {k: (v + two[k]) // 2 if "words" in k else v for k, v in one.items()}
    with pytest.raises(ArtifactError, match="an average of checkpoints with different masks"):
        pruned_model(None, VOCAB).load_state_dict(mixed)


WIDE = dict(encoder_embed_dim=32, decoder_embed_dim=32, decoder_input_dim=32, decoder_output_dim=32)


@pytest.mark.parametrize(
    ("layers", "lengths"), [(2, ([5, 2], [4, 6])), (1, ([131, 40], [30, 130]))], ids=["short", "long"]
)
@pytest.mark.parametrize(("sparsity", "empty_rows"), [(0.6, False), (0.95, True)], ids=["guaranteed", "empty rows"])
def test_kernels_and_sdpa_agree_in_outputs_and_gradients(layers, lengths, sparsity, empty_rows):
    """Sentences and the tile lists; padded on the left as fairseq does; beyond the range of the masks."""
    masks = random_masks(sparsity, longest=(20, 22), empty_rows=empty_rows, layers=layers)
    sizes = {**WIDE, "encoder_layers": layers, "decoder_layers": layers}
    source, target = batch(lengths[0], VOCAB, left=True).to(DEVICE), targets(lengths[1]).to(DEVICE)
    results = []
    for backend in ("sdpa", "triton"):
        model = pruned_model(masks, VOCAB, attention_backend=backend, **sizes).to(DEVICE).train()
        logits = model(source, source.ne(PAD).sum(1), target)[0]
        logits[target.ne(PAD)].log_softmax(-1)[:, 5].mean().backward()
        results.append((logits[target.ne(PAD)], {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-4)
    for name, gradient in results[0][1].items():
        difference = (gradient - results[1][1][name]).abs().max()
        assert difference <= 1e-5 + 1e-3 * gradient.abs().max(), name


def test_a_backward_pass_runs_no_callbacks_of_weak_references():
    """Most interrupts arrive during it, and Python drops what is raised in such a callback: training went on."""
    model = pruned_model(random_masks(0.5), VOCAB).to(DEVICE).train()
    source = batch([5, 2], VOCAB, left=True).to(DEVICE)
    loss = model(source, source.ne(PAD).sum(1), targets([4, 6]).to(DEVICE))[0].sum()
    called = []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_filename) if event == "call" else None)
    try:
        loss.backward()
    finally:
        sys.setprofile(None)
    assert called and not [name for name in called if Path(name).name in ("weak.py", "weakref.py")]


def test_a_checkpoint_of_version_0_1_that_names_the_back_end_eager_loads_as_sdpa():
    stored = OmegaConf.create({"_name": "pruned_transformer", "attention_backend": "eager"})
    assert merge_with_parent(PrunedTransformerConfig(), stored, remove_missing=True).attention_backend == "sdpa"
    parser = options.get_training_parser()
    with pytest.raises(SystemExit):
        options.parse_args_and_arch(parser, "data --arch pruned_transformer --attention-backend eager".split())


def test_reading_weights_does_not_change_the_output_of_the_kernels():
    model = pruned_model(random_masks(0.6), VOCAB, attention_backend="triton", **WIDE).to(DEVICE)
    module = dict(attention_sites(model))[AttentionKind.CROSS, 0]
    query, key = torch.randn(4, 2, 32, device=DEVICE), torch.randn(9, 2, 32, device=DEVICE)
    with torch.no_grad():
        plain, _ = module(query, key, key, need_weights=False)
        read, weights = module(query, key, key, need_weights=True)
    assert torch.equal(plain, read) and weights.shape == (2, 4, 9)


def test_kernels_asked_for_by_name_are_used_or_refused():
    with pytest.raises(UserError, match=r"heads of 16 / 2 = 8 elements.*16, 32, 64, 96, 128"):
        pruned_model(None, VOCAB, attention_backend="triton")
    model = pruned_model(random_masks(0.6), VOCAB, attention_backend="triton", **WIDE).double().to(DEVICE)
    with pytest.raises(UserError, match=r"--attention-backend triton: .* cannot run on dtype torch.float64"):
        translate(model, batch([5], VOCAB, left=True).to(DEVICE), targets([4]).to(DEVICE))
    model = pruned_model(random_masks(0.6), VOCAB, attention_backend="triton", attention_dropout=0.1, **WIDE).to(DEVICE)
    for _, module in attention_sites(model):
        module.dropout_module.apply_during_inference = True
    encoder_out = model.encoder(batch([5], VOCAB, left=True).to(DEVICE))
    with pytest.raises(UserError, match="dropout 0.1 while decoding.*use auto or sdpa"):
        model.decoder(targets([1]).to(DEVICE), encoder_out=encoder_out, incremental_state={})
