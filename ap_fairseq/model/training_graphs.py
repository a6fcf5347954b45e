"""Training updates without launch overhead: encoder, if any, and decoder, forward and backward, as CUDA graphs.

An update of a translation model launches some two thousand kernels, and at the usual batch sizes the host needs longer
to launch them than the GPU to run them. Here the passes over one shape of batch run directly the first time, are
captured the second time, and replayed from then on; in fairseq a shape comes about once an epoch. Batches are padded a
little, so that there are few shapes. Output projection, criterion and optimizer stay outside: they launch little, and
any criterion works.

Captured passes read and write memory that stays where it is. All graphs share one pool, because only one of them is
between its forward and its backward pass at any time; a forward pass that comes in between is run directly.
"""

from __future__ import annotations

import logging
import weakref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from ap_fairseq.cuda_graphs import GraphPool
from ap_fairseq.model.attention import MASK_BUFFERS
from ap_fairseq.sites import attention_sites
from triton_ops import Layout

logger = logging.getLogger(__name__)

MOST_GRAPHS = 256  # further shapes are run directly

Shape = tuple[int, int, int]  # sentences, source length (0 without an encoder), target length


def not_captured(model: nn.Module) -> str | None:
    """Return the option of a pruned transformer that cannot be captured, or None."""
    cfg = model.cfg
    options = {
        "--checkpoint-activations": cfg.checkpoint_activations,
        "--load-alignments": model.decoder.guided_alignment,
        "LayerDrop": cfg.encoder.layerdrop or cfg.decoder.layerdrop,
        "--cross-self-attention": cfg.cross_self_attention,
        "--no-cross-attention": hasattr(model, "encoder") and cfg.no_cross_attention,
        "--adaptive-input": cfg.adaptive_input,
        "--character-embeddings": getattr(cfg, "character_embeddings", False),
        "--attention-top-k or --attention-threshold": cfg.attention_top_k or cfg.attention_threshold,
    }
    return next((name for name, given in options.items() if given), None)


def rounded(n: int, least: int) -> int:
    """Round up to a multiple of *least*, or of the power of two at n / 16 or below: at most a sixteenth more."""
    step = max(least, (1 << n.bit_length()) >> 5)
    return -(-n // step) * step


class TrainingGraphs:
    """The graphs of one model.

    Args:
        model: a pruned transformer or language model that is trained.
        capture: False runs the passes over static memory directly; needs no GPU and serves tests.
    """

    def __init__(self, model: nn.Module, capture: bool = True):
        self.model = weakref.proxy(model)
        self.capture = capture
        self.encoder = getattr(model, "encoder", None)  # a language model has none
        self.given_up = False  # for lack of memory: everything is left to the model
        self.forget()

    def forget(self) -> None:
        """Drop all graphs and their memory."""
        self.graphs: dict[Shape, _Graph] = {}
        self.pool = GraphPool()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.addresses = self._addresses()
        # Passes differentiate by aliases. What accumulates into the parameters themselves belongs to the stream on
        # which data-parallel training first touched it, and a capture must not wait for another stream.
        aliases = {p: p.detach().requires_grad_() for p in self.parameters}
        self.leaves = list(aliases.values())
        self.encoder_params, self.decoder_params = (
            {name: aliases[p] for name, p in part.named_parameters(remove_duplicate=False) if p in aliases}
            for part in (self.encoder or nn.Identity(), self.model.decoder)
        )
        self.masks = self._masks()
        # Shared by all graphs: decoder features, their gradient, and the gradients of the parameters.
        first = self.parameters[0]
        self.features, self.features_grad = first.new_empty(0), first.new_empty(0)
        self.gradients = first.new_empty(sum(p.numel() for p in self.parameters))
        self._pending: weakref.ref | None = None

    def _masks(self) -> list[Tensor]:
        return [getattr(module, name) for _, module in attention_sites(self.model) for name in MASK_BUFFERS]

    def _addresses(self) -> list[int]:
        """Return the addresses of parameters and fairseq's position tables; when one changes, all graphs are void.

        A table moves when a longer sentence comes, for instance in the translations of --eval-bleu, or by rounding.
        """
        parts = (part for part in (self.encoder, self.model.decoder) if part is not None)
        tables = [x for part in parts if part.embed_positions is not None for x in part.embed_positions.buffers()]
        return [tensor.data_ptr() for tensor in (*self.parameters, *tables)]

    def layouts(self) -> list[Layout | None]:
        """Return the layouts that attention reads now, which modules replace when longer sentences come."""
        return [module.built_layout for _, module in attention_sites(self.model)]

    def _valid(self) -> bool:
        same_masks = all(a is b for a, b in zip(self.masks, self._masks(), strict=True))
        return same_masks and self.addresses == self._addresses()

    def __call__(self, src_tokens: Tensor | None, prev_output_tokens: Tensor) -> Tensor | None:
        """Compute the features of the decoder, (B, T, C), differentiable; None if that has to be done directly.

        Args:
            src_tokens: int64 (B, S); None for a language model.
            prev_output_tokens: int64 (B, T).
        """
        if self.given_up or self._is_pending() or torch.is_autocast_enabled(prev_output_tokens.device.type):
            return None
        if not self._valid():
            self.forget()
        n_sentences, target_length = prev_output_tokens.shape
        source_length = 0 if src_tokens is None else rounded(src_tokens.size(1), 4)
        shape = (rounded(n_sentences, 1), source_length, rounded(target_length, 4))
        if shape not in self.graphs:
            if len(self.graphs) == MOST_GRAPHS:
                return None
            self.graphs[shape] = _Graph(self, shape)
        graph = self.graphs[shape]
        if self.capture and graph.passes is None and graph.layouts == self.layouts() and not self._captured(graph):
            return None
        forward = _Forward()
        self._pending = weakref.ref(forward)
        return _Replay.apply(graph, forward, src_tokens, prev_output_tokens, *self.parameters)

    def _captured(self, graph: _Graph) -> bool:
        """Capture a graph, or give up all of them where there is no memory for that."""
        try:
            graph.capture()
        except torch.cuda.OutOfMemoryError as error:
            self.forget()
            self.gradients = self.features = self.features_grad = None
            torch.cuda.empty_cache()
            self.given_up = True
            lengths = [part.size(1) for part in (graph.source, graph.target) if part is not None]
            samples = "blocks" if graph.source is None else "sentences"
            logger.warning(
                f"training updates run directly from now on: {len(graph.target)} {samples} of "
                f"{' and '.join(map(str, lengths))} tokens could not be captured as a CUDA graph; lower --max-tokens "
                f"({error})"
            )
        return not self.given_up

    def _is_pending(self) -> bool:
        forward = self._pending and self._pending()
        return forward is not None and not forward.done

    def buffers(self, n: int) -> tuple[Tensor, Tensor]:
        """Return memory for n features and their gradients; graphs keep what they were given before it grew."""
        if self.features.numel() < n:
            self.features, self.features_grad = self.features.new_empty(n), self.features.new_empty(n)
        return self.features[:n], self.features_grad[:n]

    def by_parameter(self, gradients: Tensor) -> list[Tensor]:
        """Cut the gradients of all parameters, one after the other, into views."""
        parts = gradients.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    def __deepcopy__(self, memo):
        return None  # a copy of the model makes its own


class CapturedUpdates:
    """The part of a pruned model that replays its training updates (``--cuda-graphs``)."""

    _graphs: TrainingGraphs | None = None
    _use_graphs = True

    def training_graphs(self, device: torch.device) -> TrainingGraphs | None:
        """Return what replays the update that is computed now; None outside of training, or if nothing does."""
        if not (self.training and torch.is_grad_enabled()):
            return None
        if self._graphs is None and self._use_graphs and device.type == "cuda":
            reason = not_captured(self)
            if reason is None:
                self._graphs = TrainingGraphs(self)
                logger.info("training updates are replayed as CUDA graphs, one for each shape of batch (--cuda-graphs)")
            else:
                logger.info(f"training updates run directly: {reason} cannot be captured as a CUDA graph")
                self._use_graphs = False
        return self._graphs

    def replayed(
        self, src_tokens: Tensor | None, tokens: Tensor, features_only: bool
    ) -> tuple[Tensor, dict[str, list]] | None:
        """Return the output of an update that is replayed, without states of layers; None: compute it directly."""
        graphs = self.training_graphs(tokens.device)
        features = None if graphs is None else graphs(src_tokens, tokens)
        if features is None:
            return None
        output = features if features_only else self.decoder.output_layer(features)
        return output, {"attn": [None], "inner_states": []}


class _Forward:
    """A forward pass whose backward pass may still come: it is neither done nor dropped."""

    done = False


class _Graph:
    """Both passes over one shape of batch."""

    def __init__(self, owner: TrainingGraphs, shape: Shape):
        self.owner = weakref.proxy(owner)
        model, device = owner.model, owner.parameters[0].device
        n, source_length, target_length = shape
        self.source: Tensor | None = None
        if source_length:
            self.source = torch.full((n, source_length), model.encoder.padding_idx, device=device)
        self.target = torch.full((n, target_length), model.decoder.padding_idx, device=device)
        size = model.decoder.output_embed_dim
        self.features, self.features_grad = (
            part.view(n, target_length, size) for part in owner.buffers(n * target_length * size)
        )
        self.gradients = owner.by_parameter(owner.gradients)
        # What it ran on directly, and then is captured with: kernels are compiled, and what they read of the masks is
        # made. A capture would only note how to make it, for whoever finds it later.
        self.layouts: list[Layout | None] | None = None
        self.passes: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None

    def capture(self) -> None:
        """Capture both passes."""
        owner = self.owner
        try:
            forward, output = owner.pool.capture(self.forward)
            backward, _ = owner.pool.capture(lambda: self.backward(output))
        except BaseException:
            owner.forget()  # a pool whose only capture failed cannot be used again
            raise
        self.passes = forward, backward

    def forward(self) -> Tensor:
        """Compute the features of `target` under `source`; they are left in `features` too."""
        owner, model = self.owner, self.owner.model
        encoder_out = None
        if self.source is not None:
            encoder_out = functional_call(model.encoder, owner.encoder_params, (self.source,))
        options = dict(encoder_out=encoder_out, features_only=True)
        output, _ = functional_call(model.decoder, owner.decoder_params, (self.target,), options)
        self.features.copy_(output.detach())
        return output

    def backward(self, output: Tensor) -> None:
        """Leave the gradients of the parameters that are used in `gradients`."""
        found = torch.autograd.grad(output, self.owner.leaves, self.features_grad, allow_unused=True)
        self.used = [grad is not None for grad in found]
        for kept, grad in zip(self.gradients, found, strict=True):
            if grad is not None:
                kept.copy_(grad)


class _Replay(torch.autograd.Function):
    """Features from a graph, with the gradients of all parameters."""

    @staticmethod
    def forward(
        ctx, graph: _Graph, pending: _Forward, source: Tensor | None, target: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.graph, ctx.pending, ctx.shape = graph, pending, target.shape
        model = graph.owner.model
        for static, tokens in ((graph.source, source), (graph.target, target)):
            if tokens is not None:
                static.fill_(model.decoder.padding_idx)[: tokens.size(0), : tokens.size(1)] = tokens
        if graph.passes is not None:
            graph.passes[0].replay()
        else:
            with torch.enable_grad():
                ctx.output = graph.forward()
            ctx.layouts = graph.owner.layouts()
        return graph.features[: target.size(0), : target.size(1)]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        graph, (n, length) = ctx.graph, ctx.shape
        if ctx.pending.done:
            raise RuntimeError(
                "a second backward pass through an update that was replayed as a CUDA graph: its activations are gone; "
                "train with --cuda-graphs off"
            )
        graph.features_grad.zero_()[:n, :length] = grad
        if graph.passes is not None:
            graph.passes[1].replay()
        else:
            graph.backward(ctx.output)
            graph.layouts = ctx.layouts
        ctx.pending.done = True
        gradients = graph.owner.by_parameter(graph.owner.gradients.clone())  # the next replay overwrites them
        return None, None, None, None, *(g if used else None for g, used in zip(gradients, graph.used, strict=True))
