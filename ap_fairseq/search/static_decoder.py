"""fairseq's beam search on the device: no step waits for the host.

fairseq's generator is bound by Python and kernel launches: it reads back which hypotheses ended in every step, reorders
every cache, and shrinks all tensors when a sentence is finished. Here one step (decoder, choice of candidates, finished
hypotheses) works on buffers that stay where they are, so that on a GPU it is captured once as a CUDA graph per batch
size and replayed. Hypotheses are recorded as back-pointers and read out once, at the end. The host looks at the number
of unfinished sentences a step late, and halves the batch when enough of them are finished.

The rules of the search are those of ``fairseq.sequence_generator``: same hypotheses, same scores.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ap_fairseq.cuda_graphs import GraphPool
from ap_fairseq.model.attention import PrunedMultiheadAttention
from ap_fairseq.model.kv_cache import INITIAL_CAPACITY, SourceSlots, compact, renumber_live
from ap_fairseq.model.language_model import PrunedLanguageModel
from ap_fairseq.model.layers import left_padding, rotate_left
from ap_fairseq.model.transformer import PrunedTransformerModel
from ap_fairseq.search.beams import BeamSearchState
from ap_fairseq.search.capacity import Capacity, bucket
from ap_fairseq.search.hypotheses import Hypotheses
from ap_fairseq.search.restrictions import Restrictions
from ap_fairseq.search.rules import WITHIN_PREFIX, SearchRules
from ap_fairseq.search.running import Batch, EncoderOuts, RunningSearch, host_copy
from ap_fairseq.search.source_pass import MAX_TOKENS, SourcePass
from ap_fairseq.search.static_cache import StaticCrossAttentionCache, StaticSelfAttentionCache
from ap_fairseq.search.stored_columns import StoredColumns
from ap_fairseq.search.strategies import Sampling, Step
from ap_fairseq.sites import AttentionKind, attention_sites, layers_of
from triton_ops import Layout
from triton_ops.beam_state import penalized_log_probs

HOST_LAG_STEPS = 1  # that the host runs ahead of a GPU; as many follow in vain when all sentences are finished
SHORTEST_PREFILL = 8  # tokens of a prefix that are worth a pass of their own, which no graph replays
MAX_LOGITS = 1 << 26  # that such a pass computes at a time

Model = PrunedTransformerModel | PrunedLanguageModel
LayerStep = Callable[[Tensor], Tensor]  # one new token of the hypotheses, (N, C) -> (N, C)
ModelStep = Callable[[Tensor], Tensor]  # the last tokens of the hypotheses, int64 (N,) -> logits (N, V) of the next


class StaticDecoder:
    """Buffers of one capacity, the decoders bound to them, and the graphs that were captured over them."""

    def __init__(self, models: Iterable[Model], rules: SearchRules, capacity: Capacity, device: torch.device):
        self.models, self.rules, self.capacity = list(models), rules, capacity
        self.penalties = rules.token_penalties(device)
        self.penalty = torch.empty_like(self.penalties[0])  # of the step
        self.positions = [_position_table(model.decoder, capacity.positions, device) for model in self.models]
        self.output_layers: list[Callable[[Tensor], Tensor]] = [model.decoder.output_layer for model in self.models]
        modules = decoder_modules(self.models)
        self.self_sites, self.cross_sites = (
            [module for module in modules if module.self_attention is own] for own in (True, False)
        )
        sites = (site for model in self.models for site in attention_sites(model))
        self.encoder_sites = [module for (kind, _), module in sites if kind is AttentionKind.ENCODER_SELF]
        self.heads = head_slices(self.self_sites) | head_slices(self.cross_sites)
        dtype = next(self.models[0].parameters()).dtype
        self._allocate(dtype, device)
        self.used: dict[PrunedMultiheadAttention, int] = {}  # slots of each pool in use, as the host counts them
        self.graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}  # of n sentences, within prefixes or not
        self.moves: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}  # of n places to fewer
        self.graph_pool, self.source_pool = GraphPool(), GraphPool()  # results of the latter outlive steps
        self.source_passes: dict[tuple[int, int], SourcePass] = {}  # by sentences and columns
        self.source_shapes: set[tuple[int, int]] = set()  # that came before
        self.stored = StoredColumns(self.cross_sites, capacity)
        self.layouts: list[Layout] = []
        # Graphs hold addresses: of the parameters, and of the layouts, which must not be dropped before them.
        self.parameters = [
            (part._parameters, name) for model in self.models for part in model.modules() for name in part._parameters
        ]
        self.addresses = self._addresses()
        kernels = modules[0].runs_kernels(dtype, device)
        waits = any(module.waits_for_device(dtype, device) for module in modules)
        self.capture = kernels and device.type == "cuda" and not waits
        self.repeats_sources = bool(self.capture and self.cross_sites) and all(
            module.runs_kernels(dtype, device) for module in self.encoder_sites
        )
        heads = ([module.num_heads for module in sites] for sites in (self.self_sites, self.cross_sites))
        self.beams = BeamSearchState(capacity, rules.beam, *heads, device, kernels)
        self.restrictions = Restrictions(self.beams.state, rules)
        self.memory = None if rules.strategy is None else rules.strategy.memory(capacity.sentences, device)

    def _allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make the pools of the KV caches, and room for the stacked projections of self-attention."""

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        n_slots = self.capacity.sentences * self.rules.beam * min(INITIAL_CAPACITY, self.capacity.positions)
        self.kv_pools = {module: empty(n_slots * module.num_heads, 2, module.head_dim) for module in self.self_sites}
        # Those of cross-attention grow to the size of the first batch. They have room for any SourcePass before that:
        # growing costs the graphs of all batches so far.
        n_columns = min(MAX_TOKENS, self.capacity.sentences * self.capacity.source_length)
        self.kv_pools |= {
            module: empty(n_columns * module.num_heads, 2, module.head_dim) for module in self.cross_sites
        }
        self.projections = {
            module: (empty(3 * module.embed_dim, module.embed_dim), empty(3 * module.embed_dim))
            for module in self.self_sites
        }

    def _values(self) -> Iterator[Tensor]:
        """Yield the parameters as they are now; walking through the modules takes ten times as long."""
        return (owner[name] for owner, name in self.parameters if owner[name] is not None)

    def _addresses(self) -> list[int]:
        return [value.data_ptr() for value in self._values()]

    def _layouts(self) -> list[Layout]:
        n, size = self.capacity.positions, self.capacity.source_length
        return [module.layout(n, n if module.self_attention else size) for module in self.kv_pools]

    def serves(self, rules: SearchRules, needed: Capacity) -> bool:
        """Whether a batch fits, the rules are the same, and the models are still where the graphs found them."""
        return self.rules == rules and self.capacity.covers(needed) and self.addresses == self._addresses()

    def marks(self) -> list[Any]:
        """Return torch's mode, and versions of all parameters and masks: a search goes on only while they are the same.

        A change through a parameter's ``.data`` is not seen: torch does not count it.
        """
        versions = [value._version for value in self._values() if not value.is_inference()]
        sites = (*self.encoder_sites, *self.self_sites, *self.cross_sites)
        return [torch.is_inference_mode_enabled(), *versions, *(module.built_layout for module in sites)]

    def encoder_layouts(self) -> list[Layout | None]:
        """Return the masks as the encoders read them now."""
        return [module.built_layout for module in self.encoder_sites]

    def _forget_steps(self) -> None:
        self.graphs.clear()
        self.moves.clear()
        self.graph_pool = GraphPool()

    def _forget_graphs(self) -> None:
        self._forget_steps()
        self.source_passes.clear()
        self.source_pool = GraphPool()

    # -- a batch ------------------------------------------------------------------------------------------------------

    def begin(self, batch: Batch, encoder_outs: EncoderOuts | None = None) -> RunningSearch:
        """Encode a batch and make all ready for the first step of its search.

        The search before this one must have finished: it had the same buffers.

        Args:
            encoder_outs: what `encode_early` returned for this batch.
        """
        if self.capture and self.layouts != (layouts := self._layouts()):
            self._forget_graphs()
            self.layouts = layouts
        n_sentences, prefix = batch.source_lengths.numel(), batch.prefix
        prefix = prefix[:, : batch.max_len] if prefix is not None else batch.source_lengths.new_empty(n_sentences, 0)
        encoder_outs = self._begin(batch, encoder_outs)
        self.restrictions.begin(prefix, batch.source_lengths)
        if done := prefill_length(prefix, self.rules):
            self._prefill(encoder_outs, prefix[:, :done], batch.first_token, batch.max_len)
        return RunningSearch(batch, encoder_outs, self._places(n_sentences), done, prefix.size(1))

    def encode_early(self, batch: Batch) -> EncoderOuts | None:
        """Encode a batch whose search begins later, unless a graph (`SourcePass`) will do that."""
        return self.encode(batch.net_input) if self._source_shape(batch.net_input) is None else None

    def encode(self, net_input: dict[str, Tensor]) -> EncoderOuts | None:
        """Return what the encoder of every model says, if the models have one."""
        if not hasattr(self.models[0], "encoder"):
            return None
        return [model.encoder.forward_torchscript(net_input) for model in self.models]

    def launch(self, search: RunningSearch, n_steps: int) -> None:
        """Launch steps of a search, and wait for none; those after the end of the search are run in vain."""
        for _ in range(min(n_steps, search.batch.max_len + 1 - search.step)):
            self._next_step(search)

    def finish(self, search: RunningSearch, nbest: int | None = None) -> Callable[[], Hypotheses]:
        """Run a search to its end.

        Args:
            nbest: at most this many hypotheses of each sentence; None: all.

        Returns:
            What waits for the results, those of ``SequenceGenerator.generate``, and returns them. The next search may
            begin before.
        """
        counts: deque[Callable[[], Tensor]] = deque()
        lag = HOST_LAG_STEPS if self.beams.state.unfinished.is_cuda else 0
        while search.step <= search.batch.max_len:
            self._next_step(search)
            counts.append(host_copy(self.beams.state.unfinished))
            if len(counts) > lag:
                unfinished = int(counts.popleft()())
                if unfinished == 0:
                    break
                if (smaller := self._places(unfinished)) < search.n:
                    self._shrink(search.n, smaller)
                    search.n = smaller
                    counts.clear()  # of the larger batch
        lengths = search.batch.source_lengths
        longest = lengths if self.rules.match_source_len else None
        return self.beams.hypotheses(
            lengths.numel(), search.step, self.rules.eos, self.rules.len_penalty, longest, nbest
        )

    def _next_step(self, search: RunningSearch) -> None:
        step, max_len, before = search.step, search.batch.max_len, search.phase
        search.phase = self.rules.phase(step, max_len, search.prefix_len)
        if search.phase != before:
            self.penalty.copy_(self.penalties[search.phase])
        self._reserve_step(search.n, step, max_len)
        self._run(search.n, step < search.prefix_len)
        search.step += 1

    def _places(self, n_sentences: int) -> int:
        """Return how many places a batch has for *n_sentences*: one of few numbers, each of which has a graph."""
        return bucket(n_sentences)

    def _reserve_step(self, n: int, step: int, max_len: int) -> None:
        """Make sure that the pools have room for a step of the first *n* sentences, and count its slots."""
        new = {module: n * self.rules.beam * module.num_heads for module in self.self_sites}
        if any(self.used[module] + new[module] > self.kv_pools[module].size(0) for module in new):
            self._make_room(n, step, max_len)
        for module, number in new.items():
            self.used[module] += number

    def _shrink(self, n: int, smaller: int) -> None:
        """Move the unfinished ones of the first *n* sentences to the first *smaller* places: some forty kernels."""
        if graph := self.moves.get((n, smaller)):
            graph.replay()
            return
        self._move(n, smaller)
        if self.capture:
            self.moves[n, smaller], _ = self.graph_pool.capture(lambda: self._move(n, smaller))

    def _move(self, n: int, smaller: int) -> Tensor:
        """Do what `_shrink` does, directly; return where those in the first *smaller* places were."""
        order = self.beams.shrink(n, smaller)
        self.restrictions.select(order)
        return order

    def _begin(self, batch: Batch, encoder_outs: EncoderOuts | None) -> EncoderOuts | None:
        """Encode a batch, unless that is done, and prepare the state of its search and the caches."""
        tokens, n_first = batch.tokens, 1
        if self.rules.strategy is not None:
            n_first = self.rules.strategy.n_first(self.rules.beam)
            self.memory.zero_()
        source_pass = self._source_pass(batch.net_input)
        if source_pass is not None:
            self.beams.begin(tokens.ne(self.rules.pad).sum(1), batch.max_len, batch.first_token, n_first)
            self._prepare_self_caches()
            return source_pass(self, tokens)
        if hasattr(self.models[0], "encoder"):  # which moves each source to column 0
            real = rotate_left(tokens, left_padding(tokens, self.rules.pad)).ne(self.rules.pad)
        else:
            real = torch.ones(tokens.size(0), 1, dtype=torch.bool, device=tokens.device)
        self.beams.begin(real.sum(1), batch.max_len, batch.first_token, n_first)
        return self._prepare_caches(batch, real, encoder_outs)

    def _source_shape(self, net_input: dict[str, Tensor]) -> tuple[int, int] | None:
        """Return sentences and columns of the graph that encodes such a batch, if one does: few and short sources."""
        if not self.repeats_sources or not net_input.keys() <= {"src_tokens", "src_lengths", "prev_output_tokens"}:
            return None
        n, size = net_input["src_tokens"].shape
        columns = min(bucket(size), *(model.encoder.max_positions() for model in self.models))
        return None if columns < size or n * columns > MAX_TOKENS else (n, columns)

    def _source_pass(self, net_input: dict[str, Tensor]) -> SourcePass | None:
        """Return the graph that encodes a batch, from the second batch of its size on."""
        shape = self._source_shape(net_input)
        if shape is None:
            return None
        if shape not in self.source_shapes:
            self.source_shapes.add(shape)
            return None
        found = self.source_passes.get(shape)
        if found is None or not found.is_valid(self):
            device = net_input["src_tokens"].device
            found = self.source_passes[shape] = SourcePass(self, *shape, self.capacity.positions - 1, device)
        return found

    def _prepare_caches(self, batch: Batch, real: Tensor, encoder_outs: EncoderOuts | None) -> EncoderOuts | None:
        """Encode a batch, unless that is done, empty the caches of self-attention and fill those of cross-attention.

        Args:
            real: bool (B, S), which source tokens there are, from column 0 on; (B, 1) of language models.
        """
        self._prepare_self_caches()
        slots = self.stored.slots(real, batch.max_len) if self.cross_sites else {}  # waits, so before the encoders run
        if encoder_outs is None:
            encoder_outs = self.encode(batch.net_input)
        if slots:
            self.fill_sources(encoder_outs, slots)
        return encoder_outs

    def _prepare_self_caches(self) -> None:
        self.used = dict.fromkeys(self.self_sites, 0)
        self._copy_projections()

    def _copy_projections(self) -> None:
        """Stack the weights of q, k and v of every site as they are now: one product of a step for three."""
        kept: list[Tensor] = []
        current: list[Tensor] = []
        for module, stacked in self.projections.items():
            parts = (module.q_proj, module.k_proj, module.v_proj)
            kept += [part for whole in stacked for part in whole.chunk(3)]
            current += [part.weight for part in parts] + [part.bias for part in parts]
        torch._foreach_copy_(kept, current)  # as torch's optimizers do: one launch for all

    def fill_sources(self, encoder_outs: EncoderOuts, slots: dict[PrunedMultiheadAttention, SourceSlots]) -> None:
        """Fill the pools of cross-attention."""
        by_site = [slots[module] for module in self.cross_sites]
        starts, offsets = torch.cat([x.starts for x in by_site], 1), torch.cat([x.offsets for x in by_site])
        self.beams.starts[: starts.size(0)] = starts
        self.beams.source_offsets[:, : offsets.size(1)] = offsets
        for model, encoder_out in zip(self.models, encoder_outs, strict=True):
            source = encoder_out["encoder_out"][0].transpose(0, 1)
            chosen: dict[int, Tensor] = {}
            for (kind, _), module in attention_sites(model):
                if kind is AttentionKind.CROSS:
                    own = slots[module]
                    if id(own) not in chosen:
                        chosen[id(own)] = source[own.projected]
                    self._store_source(module, own, chosen[id(own)])

    def _store_source(self, module: PrunedMultiheadAttention, slots: SourceSlots, source: Tensor) -> None:
        n_slots = slots.column.numel()
        self.reserve(module, n_slots)
        self.kv_pools[module][:n_slots] = slots.gather(module.project_source(source))

    @torch.inference_mode(False)
    def reserve(self, module: PrunedMultiheadAttention, n_slots: int) -> None:
        """Give a module a pool of *n_slots* or more; the contents of a smaller one are lost."""
        if self.kv_pools[module].size(0) < n_slots:
            self._forget_graphs()
            nothing = self.kv_pools[module] = self.kv_pools[module].new_empty(0)  # frees what the next one may take
            self.kv_pools[module] = nothing.new_empty(bucket(n_slots), 2, module.head_dim)

    @torch.inference_mode(False)
    def _make_room(self, n: int, length: int, max_len: int) -> None:
        """Drop slots that no hypothesis refers to or no coming mask row keeps any more.

        Pools are enlarged if that frees less than half of them.
        """
        live = renumber_live(self.beams.state.block_table[: n * self.rules.beam, :length])
        n_rows, positions = self.capacity.rows(max_len), self.capacity.positions
        for module in self.self_sites:
            readable = module.last_use(n_rows, positions)[:, :length] >= length
            offsets = self.beams.offsets[self.heads[module], :length]
            n_new = n * self.rules.beam * module.num_heads
            pool, used = compact(self.kv_pools[module], offsets, live, readable, n_new, max_len + 1 - length)
            if pool is not self.kv_pools[module]:
                self._forget_steps()
            self.kv_pools[module], self.used[module] = pool, used
            self.beams.used[self.heads[module]] = used

    # -- a prefix -----------------------------------------------------------------------------------------------------

    def _prefill(self, encoder_outs: EncoderOuts | None, prefix: Tensor, first_token: int, max_len: int) -> None:
        """Do the steps of *prefix*, int64 (B, P), by one pass over its positions, whose slots all beams share."""
        previous = prefix.roll(1, 1)
        previous[:, 0] = first_token
        features = [
            self._cache_prefix(model, previous, encoder_out, max_len)
            for model, encoder_out in zip(self.models, encoder_outs or [None] * len(self.models), strict=True)
        ]
        n_positions = max(1, MAX_LOGITS // (prefix.size(0) * self.rules.vocab_size))
        log_probs = []
        for start in range(0, prefix.size(1), n_positions):
            part = slice(start, start + n_positions)
            rows = [layer(x[:, part].flatten(0, 1)) for layer, x in zip(self.output_layers, features, strict=True)]
            logits = self._combined(rows)
            scores = penalized_log_probs(logits, self.penalties[WITHIN_PREFIX])
            log_probs.append(scores.gather(1, prefix[:, part].flatten()[:, None]).view(prefix.size(0), -1))
        self.beams.skip(prefix, torch.cat(log_probs, 1).cumsum(1))
        self.restrictions.skip(previous)

    def _cache_prefix(self, model: Model, previous: Tensor, encoder_out: dict | None, max_len: int) -> Tensor:
        """Fill the pools of self-attention by the tokens *previous* (B, P); return features, (B, P, C)."""
        (n, size), decoder = previous.shape, model.decoder
        features, extra = decoder.extract_features(previous, encoder_out=encoder_out)
        for layer, x in zip(layers_of(decoder), extra["inner_states"][:-1], strict=True):
            module = layer.self_attn
            if layer.normalize_before:
                x = layer.self_attn_layer_norm(x)
            kv = module.project_source(x.flatten(0, 1)).unflatten(0, (size, n))
            self._store_prefix(module, kv, max_len)
        return features

    def _store_prefix(self, module: PrunedMultiheadAttention, kv: Tensor, max_len: int) -> None:
        """Store keys and values of the first positions, (P, B, 2, H, D): those that coming rows read, head by head."""
        size, n = kv.shape[:2]
        n_rows, positions = self.capacity.rows(max_len), self.capacity.positions
        readable = module.last_use(n_rows, positions)[:, :size] >= size  # (H, P)
        kv = kv.permute(3, 0, 1, 2, 4)[readable]
        used = self.used[module] = kv.size(0) * n
        self.reserve(module, used + bucket(n) * self.rules.beam * module.num_heads)  # and for the next step
        self.kv_pools[module][:used] = kv.flatten(0, 1)
        number = (readable.flatten().cumsum(0) - 1).view_as(readable)
        self.beams.offsets[self.heads[module], :size] = (n * number * readable).to(torch.int32)
        self.beams.used[self.heads[module]] = used

    # -- a step -------------------------------------------------------------------------------------------------------

    def _run(self, n: int, within_prefix: bool) -> None:
        """One step of the first n sentences: the first time directly, then captured, from then on replayed."""
        key = n, within_prefix
        if key in self.graphs:
            self.graphs[key].replay()
            return
        steps = [self._model_step(index, n) for index in range(len(self.models))]
        self._step(n, within_prefix, steps)
        if self.capture:
            self.graphs[key], _ = self.graph_pool.capture(lambda: self._step(n, within_prefix, steps))

    def _model_step(self, index: int, n: int) -> ModelStep:
        """Bind a model's decoder to its caches of the first *n* sentences."""
        model, n_hypotheses = self.models[index], n * self.rules.beam
        caches: dict[PrunedMultiheadAttention, StaticSelfAttentionCache | StaticCrossAttentionCache] = {}
        for module in decoder_modules([model]):
            pool, heads = self.kv_pools[module], self.heads[module]
            if module.self_attention:
                projection = self.projections[module]
                caches[module] = StaticSelfAttentionCache(pool, self.beams, n_hypotheses, heads, projection)
            else:
                caches[module] = StaticCrossAttentionCache(pool, self.beams, n, heads)
        if self.beams.kernels:
            from ap_fairseq.search import fused_decoder  # imports triton

            if fused_decoder.serves(model.decoder):
                where = self.positions[index], self.beams.state.step
                return fused_decoder.FusedDecoder(model.decoder, caches, *where, n_hypotheses)
        state: dict = {}
        for module, cache in caches.items():
            module.set_incremental_state(state, "attn_state", {"cache": cache})
        layers = [layer_step(layer, state) for layer in layers_of(model.decoder)]
        embed = functools.partial(self._embed, index)
        return model_step(embed, layers, model.decoder.finish, self.output_layers[index])

    def _embed(self, index: int, tokens: Tensor) -> Tensor:
        """Embed the last tokens of the hypotheses, int64 (N,): the input of the first layer of a model, (N, C)."""
        positions = self.positions[index]
        position = None if positions is None else positions[self.beams.state.step]
        return self.models[index].decoder.embed(tokens, position)

    def _step(self, n: int, within_prefix: bool, steps: list[ModelStep]) -> None:
        """Decode one token of every hypothesis and choose how to go on. No shape and no branch depends on a value."""
        beams, rules = self.beams, self.rules
        self._number_slots(n)
        tokens = beams.state.tokens[: n * rules.beam]
        logits = self._combined([step(tokens) for step in steps])
        penalty = self.penalty
        if rules.restricted or within_prefix:
            logits, penalty = penalized_log_probs(logits, penalty), None
            self.restrictions.apply(n, logits, within_prefix)
        if rules.strategy is None:
            beams.advance(n, logits, penalty, rules.eos)
        else:
            step = Step(beams.state, n, logits, penalty, self.memory, beams.kernels)
            beams.continue_by(n, rules.strategy.candidates(step), rules.eos)
        self.restrictions.follow(n)

    def _number_slots(self, n: int) -> None:
        """Number the slots that a step of the first *n* sentences writes."""
        self.beams.number_slots(n)

    def _combined(self, outputs: list[Tensor]) -> Tensor:
        """Logits (N, V) of the next token from the outputs (N, V) of every model.

        Of an ensemble, logarithms of the average probabilities. Under adaptive softmax the outputs are features still,
        as in fairseq, and the logits are the logarithms of its probabilities.
        """
        results = []
        for model, logits in zip(self.models, outputs, strict=True):
            if self.rules.temperature != 1:
                logits = logits.div_(self.rules.temperature)
            if len(self.models) > 1 or model.decoder.adaptive_softmax is not None:
                logits = model.get_normalized_probs((logits[:, None], None), True)[:, 0]
            results.append(logits)
        if len(results) == 1:
            return results[0]
        return torch.logsumexp(torch.stack(results), 0) - math.log(len(results))


def decoder_modules(models: Iterable[Model]) -> list[PrunedMultiheadAttention]:
    """Return the attention modules that a step of decoding runs."""
    sites = (site for model in models for site in attention_sites(model))
    return [module for (kind, _), module in sites if kind is not AttentionKind.ENCODER_SELF]


def head_slices(modules: list[PrunedMultiheadAttention]) -> dict[PrunedMultiheadAttention, slice]:
    """Return where the heads of each module are among those of all."""
    ends = itertools.accumulate(module.num_heads for module in modules)
    return {module: slice(end - module.num_heads, end) for module, end in zip(modules, ends, strict=True)}


def prefill_length(prefix: Tensor, rules: SearchRules) -> int:
    """Return how many tokens of *prefix* (B, P) one pass reads: all sentences have them and go on after them."""
    if not isinstance(rules.strategy, Sampling | None):  # diverse searches charge forced tokens, too
        return 0
    if prefix.size(1) < SHORTEST_PREFILL:
        return 0
    length = int((prefix.ne(rules.pad) & prefix.ne(rules.eos)).cumprod(1).sum(1).min())
    return length if length >= SHORTEST_PREFILL else 0


def _position_table(decoder, n: int, device: torch.device) -> Tensor | None:
    """Positional embeddings of target positions 0 ... n - 1, (n, C), if the decoder has any."""
    if decoder.embed_positions is None:
        return None
    tokens = torch.full((1, n), decoder.padding_idx + 1, device=device)
    return decoder.embed_positions(tokens)[0]


def model_step(
    embed: Callable[[Tensor], Tensor],
    layers: list[LayerStep],
    finish: Callable[[Tensor], Tensor],
    project: Callable[[Tensor], Tensor],
) -> ModelStep:
    """Return the step of a decoder, from the parts that tokens pass one after the other."""

    def run(tokens: Tensor) -> Tensor:
        x = embed(tokens)
        for layer in layers:
            x = layer(x)
        return project(finish(x))

    return run


def layer_step(layer: nn.Module, incremental_state: dict) -> LayerStep:
    """Let a decoder layer compute one new token, (N, C) -> (N, C), over the caches in *incremental_state*."""

    def run(x: Tensor) -> Tensor:
        x = x[None]  # (T = 1, N, C)
        # The caches hold the projected encoder output; its place in the call only says that there is one.
        return layer(x, x, incremental_state=incremental_state)[0][0]

    return run
