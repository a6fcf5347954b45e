"""Attention head masking (Cao and Wang 2021, arXiv 2104.02205): named heads see selected source tokens only.

For analysis of cross-attention at inference time: which tokens a head may attend to is read from a file, sentence by
sentence. It comes on top of the pruning masks and runs without the kernels.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ap_fairseq.files import UserError, require_file
from ap_fairseq.model.attention import PrunedMultiheadAttention
from ap_fairseq.sites import AttentionKind, attention_sites


@dataclass(frozen=True)
class HeadMasking:
    """Named cross-attention heads, and the source tokens of each sentence that they may attend to.

    Attributes:
        path: file with a line of 0 and 1, divided by spaces, for each sentence: 1 = the heads may attend to the token.
            A line has as many numbers as the sentence has tokens, its end of sentence included.
        heads: (layer, head) of the decoder, counted from 0.
        selected: what the lines say, bool (S,) each.
    """

    path: str
    heads: tuple[tuple[int, int], ...]
    selected: tuple[Tensor, ...]

    @classmethod
    def from_options(cls, path: str | None, heads: str | None) -> HeadMasking | None:
        """Read ``--head-masking`` and ``--masked-heads``; None if neither is given.

        Raises:
            UserError: if only one of them is given, or either cannot be read.
        """
        if path is None and heads is None:
            return None
        if path is None or heads is None:
            flags = ("--masked-heads", "--head-masking")
            given, missing = flags if path is None else reversed(flags)
            raise UserError(f"{given} without {missing}; give both")
        if not re.fullmatch(r"\d+:\d+(,\d+:\d+)*", heads):
            raise UserError(f"--masked-heads {heads!r}: expected LAYER:HEAD,LAYER:HEAD,..., counted from 0")
        named = (tuple(map(int, head.split(":"))) for head in heads.split(","))
        require_file(path, "a line of 0 and 1 for each sentence")
        with open(path, encoding="utf-8-sig", errors="replace") as lines:
            rows = [line.split() for line in lines]
        for number, row in enumerate(rows, 1):
            if unknown := next((word for word in row if word not in ("0", "1")), None):
                raise UserError(f"--head-masking {path}: line {number} has {unknown!r}, expected 0 or 1 for each token")
        return cls(path, tuple(named), tuple(torch.tensor([word == "1" for word in row]) for row in rows))

    def require_sentences(self, subset: str, n: int) -> None:
        """Raise UserError unless there are as many lines as *subset* has sentences."""
        if n != len(self.selected):
            raise UserError(
                f"--head-masking {self.path} has {len(self.selected)} lines, the subset {subset!r} {n} sentences; "
                "write a line for each of them, in the order of the subset"
            )

    @contextlib.contextmanager
    def applied(self, models: Sequence[nn.Module], sample: dict[str, Any]) -> Iterator[None]:
        """Mask the heads of *models* for the sentences of *sample*, a batch of a data set.

        Raises:
            UserError: if a line does not fit its sentence, or a model has no such heads.
        """
        rows = self._rows(sample)
        masked = [(module, named) for model in models for module, named in self._modules(model)]
        try:
            for module, named in masked:
                selected = rows[:, None].repeat(1, module.num_heads, 1)
                selected[:, [head for head in range(module.num_heads) if head not in named]] = True
                module.selected = selected
            yield
        finally:
            for module, _ in masked:
                module.selected = None

    def _rows(self, sample: dict[str, Any]) -> Tensor:
        """Return the lines of the sentences of a batch, bool (B, S), with False where they are padded."""
        source = sample["net_input"]["src_tokens"]
        rows = torch.zeros(source.shape, dtype=torch.bool)
        for row, number, length in zip(
            rows, sample["id"].tolist(), sample["net_input"]["src_lengths"].tolist(), strict=True
        ):
            line = self.selected[number]
            if line.numel() != length:
                raise UserError(
                    f"--head-masking {self.path}: line {number + 1} has {line.numel()} numbers, the sentence {length} "
                    "tokens; write one for each token, the last for its end of sentence"
                )
            row[:length] = line
        return rows.to(source.device)

    def _modules(self, model: nn.Module) -> Iterator[tuple[PrunedMultiheadAttention, set[int]]]:
        """Yield the cross-attention modules of *model* that have named heads, and these."""
        sites = {site.layer: module for site, module in attention_sites(model) if site.kind is AttentionKind.CROSS}
        for layer, head in self.heads:
            if layer not in sites or head >= sites[layer].num_heads:
                n_heads = next((module.num_heads for module in sites.values()), 0)
                raise UserError(
                    f"--masked-heads {layer}:{head}: the model has {len(sites)} layers of cross-attention with "
                    f"{n_heads} heads, counted from 0"
                )
        for layer, module in sites.items():
            if named := {head for masked, head in self.heads if masked == layer}:
                if not isinstance(module, PrunedMultiheadAttention):
                    raise UserError(
                        "--head-masking masks heads of pruned_transformer; make one of this checkpoint: ap-apply "
                        "CHECKPOINT --attention-masks none"
                    )
                if module.backend == "triton":
                    raise UserError(
                        "--attention-backend triton with --head-masking: the kernels read no mask of single "
                        "sentences; use sdpa"
                    )
                yield module, named
