"""The layout says exactly what the keep mask says, in every form that the kernels read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_ops import AttentionLayout, block_sparse_attention
from triton_ops import layout as layout_module
from triton_ops.layout import COLUMN_GROUP, TILE_SIZES, TILES, WORD, key_tile
from triton_ops.testing import block_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@st.composite
def keep_masks(draw, limit=150):
    heads, q_size, k_size = draw(st.integers(1, 3)), draw(st.integers(1, limit)), draw(st.integers(1, limit))
    kind = draw(st.sampled_from(["random", "blocks", "empty", "full", "one cell"]))
    seed = draw(st.integers(0, 10**6))
    if kind == "blocks":
        return block_mask(heads, q_size, k_size, draw(st.sampled_from(TILES)), 0.5, seed).to(DEVICE)
    keep = torch.full((heads, q_size, k_size), kind == "full", device=DEVICE)
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        keep = (torch.rand(keep.shape, generator=generator) < draw(st.sampled_from([0.02, 0.5, 0.98]))).to(DEVICE)
    elif kind == "one cell":
        keep[seed % heads, seed % q_size, seed % k_size] = True
    return keep


def blocks_of(keep, tile, row, col):
    rows, cols = tile
    return keep[row * rows : (row + 1) * rows, col * cols : (col + 1) * cols]


def listed(table, head, outer, limit):
    """(full, partial) block indices below `limit`, read as the kernels read them."""
    count = int(table.counts[head, outer, limit])
    n_full, n_partial = count & 0xFFFF, count >> 16
    entries = table.entries[head, outer].tolist()
    return entries[:n_full], entries[len(entries) - n_partial :][::-1]


@settings(max_examples=120)
@given(keep_masks())
def test_words_hold_every_cell(keep):
    layout = AttentionLayout.from_keep_mask(keep, tile=64)
    assert torch.equal(layout.keep_mask(), keep)
    q_size, k_size = (keep.size(1) + 1) // 2, (keep.size(2) + 1) // 2
    assert torch.equal(layout.keep_mask(q_size, k_size), keep[:, :q_size, :k_size])


@settings(max_examples=80)
@given(keep_masks(), st.sampled_from(TILES), st.booleans())
def test_tables_list_full_and_partial_blocks_in_order(keep, tile, transposed):
    layout = AttentionLayout.from_keep_mask(keep, tile=tile)
    table = layout.key_table() if transposed else layout.query_table()
    tile = key_tile(tile) if transposed else tile
    assert (table.outer, table.inner) == (tile[::-1] if transposed else tile)
    n_outer, n_inner = table.entries.shape[1:]
    for head in range(keep.size(0)):
        for outer in range(n_outer):
            blocks = [
                blocks_of(keep[head], tile, *((inner, outer) if transposed else (outer, inner)))
                for inner in range(n_inner)
            ]
            full = [i for i, block in enumerate(blocks) if block.all()]
            partial = [i for i, block in enumerate(blocks) if block.any() and not block.all()]
            for limit in {0, n_inner // 2, n_inner}:
                expected = [i for i in full if i < limit], [i for i in partial if i < limit]
                assert listed(table, head, outer, limit) == expected


@settings(max_examples=80)
@given(keep_masks())
def test_row_lists_hold_the_kept_columns_of_every_row(keep):
    lists = AttentionLayout.from_keep_mask(keep, tile=64).row_lists()
    columns, pointers = lists.columns.tolist(), lists.pointers.tolist()
    for head in range(keep.size(0)):
        for row in range(keep.size(1)):
            places = pointers[head][row]
            assert columns[places[0] : places[-1]] == keep[head, row].nonzero().flatten().tolist()
            for group, place in enumerate(places):
                assert all(c < group * COLUMN_GROUP for c in columns[places[0] : place])
                assert all(c >= group * COLUMN_GROUP for c in columns[place : places[-1]])


@settings(max_examples=60)
@given(keep_masks())
def test_causal_removes_exactly_the_cells_to_the_right(keep):
    layout = AttentionLayout.from_keep_mask(keep, tile=32)
    assert torch.equal(layout.causal().keep_mask(), keep.tril())
    assert layout.causal() is layout.causal() and layout.causal().causal() is layout.causal()
    built_so = AttentionLayout.from_keep_mask(keep, tile=32, causal=True)
    assert torch.equal(built_so.words, layout.causal().words[..., :: built_so.row_group])
    assert built_so.causal() is built_so


@pytest.mark.parametrize("block", TILES, ids=str)
def test_the_tile_follows_the_granularity_of_a_sparse_mask(block):
    keep = block_mask(1, 2048, 2048, block, 0.8, seed=3, device=DEVICE)
    assert AttentionLayout.from_keep_mask(keep).tile == block


@pytest.mark.parametrize("size", TILE_SIZES)
def test_a_size_names_a_square_tile(size):
    assert AttentionLayout.from_keep_mask(torch.ones(1, 9, 9, dtype=torch.bool), tile=size).tile == (size, size)


def test_an_all_kept_mask_uses_the_largest_tile():
    assert AttentionLayout.from_keep_mask(torch.ones(1, 512, 512, dtype=torch.bool)).tile == (128, 128)


@pytest.mark.parametrize("block", [1, *TILE_SIZES])
def test_memory_is_one_bit_per_cell_and_short_lists(block):
    """Cells cost 1/8 byte, 1/(8 g) in blocks of g x g; tile lists 8 bytes per tile and direction, plus row ends."""
    size, heads, tile = 1024, 4, max(block, 16)
    keep = block_mask(heads, size, size, block, 0.9, seed=1)
    layout = AttentionLayout.from_keep_mask(keep, tile=tile).prepare(decode=True)
    report = layout.memory()
    tiles = (size // tile) ** 2 * heads
    assert layout.row_group == block
    assert report["cells"] == heads * size * size // 8 // block
    assert report["tile_lists"] == 2 * (8 * tiles + 4 * heads * size // tile)
    row_pointers = 4 * heads * size * (size // COLUMN_GROUP + 1)
    assert report["row_lists"] == 2 * int(keep.sum()) + row_pointers


@settings(max_examples=60)
@given(keep_masks(), st.integers(1, 200))
def test_last_rows_are_those_of_the_mask(keep, n_rows):
    layout = AttentionLayout.from_keep_mask(keep)
    rows = torch.arange(1, keep.size(1) + 1, device=keep.device)[None, :, None]
    expected = (keep * rows)[:, :n_rows].amax(1) - 1
    assert torch.equal(layout.last_use(n_rows), expected)


def test_a_corner_beyond_the_mask_is_refused():
    with pytest.raises(ValueError, match="4 x 5 positions, asked for 4 x 6"):
        AttentionLayout.from_keep_mask(torch.ones(1, 4, 5, dtype=torch.bool)).keep_mask(4, 6)


def test_a_layout_built_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        layout = AttentionLayout.from_keep_mask(torch.ones(1, 8, 8, dtype=torch.bool, device=DEVICE))
    q = torch.randn(1, 1, 8, 16, device=DEVICE, requires_grad=True)
    block_sparse_attention(q, q, q, layout, backend="triton").sum().backward()
    assert q.grad.isfinite().all()


def test_moving_to_the_same_device_keeps_the_layout():
    layout = AttentionLayout.from_keep_mask(torch.ones(1, WORD, WORD, dtype=torch.bool))
    assert layout.to("cpu") is layout


def test_building_tables_does_not_wait_for_the_device():
    """Tables are built with shapes known to the host: nothing to wait for inside a training step."""
    layout = AttentionLayout.from_keep_mask(torch.ones(2, 70, 70, dtype=torch.bool), tile=32)
    meta = layout.to("meta")
    assert meta.query_table().entries.shape == layout.query_table().entries.shape
    assert meta.causal().key_table().counts.shape == layout.key_table().counts.shape


@pytest.mark.parametrize(
    ("keep", "tile", "error", "message"),
    [
        (torch.ones(1, 4, 4), None, TypeError, "torch.float32"),
        (torch.ones(4, 4, dtype=torch.bool), None, ValueError, r"\(4, 4\)"),
        (torch.ones(1, 0, 4, dtype=torch.bool), None, ValueError, r"\(1, 0, 4\)"),
        (torch.ones(1, 4, 4, dtype=torch.bool), 48, ValueError, r"\(64, 16\).*got 48"),
        (torch.ones(1, 4, 4, dtype=torch.bool), (16, 64), ValueError, r"\(64, 16\).*got \(16, 64\)"),
    ],
)
def test_bad_masks_are_refused_with_their_values(keep, tile, error, message):
    with pytest.raises(error, match=message):
        AttentionLayout.from_keep_mask(keep, tile=tile)


def test_more_blocks_than_can_be_counted_are_refused():
    layout = AttentionLayout.from_keep_mask(torch.ones(1, 1, 16 * 32768, dtype=torch.bool, device=DEVICE), tile=16)
    with pytest.raises(ValueError, match="32768 blocks of 16 positions, at most 32767"):
        layout.query_table()


def test_more_cells_than_pointers_can_count_are_refused(monkeypatch):
    """Row pointers are int32 and would wrap beyond 2^31 kept cells, to addresses before the list."""
    monkeypatch.setattr(layout_module, "MOST_LISTED", 99)
    layout = AttentionLayout.from_keep_mask(torch.ones(1, 10, 10, dtype=torch.bool, device=DEVICE))
    with pytest.raises(ValueError, match="100 kept cells, at most 99 can be listed"):
        layout.row_lists()
    keep = torch.ones(1, 10, 10, dtype=torch.bool, device=DEVICE)
    keep[0, 0, 0] = False
    assert AttentionLayout.from_keep_mask(keep).row_lists().columns.numel() == 99
