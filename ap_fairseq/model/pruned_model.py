"""What every pruned model has in common: its masks, their provenance, and how checkpoints store them."""

from __future__ import annotations

import argparse
import hashlib
import logging
from typing import Any

import numpy as np
import torch
from fairseq import distributed
from fairseq.logging import metrics
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ap_fairseq.artifacts import PruningMasks
from ap_fairseq.compat import drop_bettertransformer_copies
from ap_fairseq.files import ArtifactError, UserError, file_sha256
from ap_fairseq.model.attention import MASK_BUFFERS, NotScriptable, upgrade_masks
from ap_fairseq.model.config import OWN_DEFAULTS
from ap_fairseq.model.cpu_linear import forget_packed
from ap_fairseq.model.dynamic import require_kinds
from ap_fairseq.model.kv_cache import peak_share
from ap_fairseq.provenance import (
    NO_PROVENANCE,
    OTHER_DIRECTION,
    OTHER_MASKS,
    decode_provenance,
    describe_sparsity,
    dictionary_sha256,
    effective_sparsity,
    encode_provenance,
    lost_masks,
)
from ap_fairseq.sites import AttentionKind, architecture, attention_sites

logger = logging.getLogger(__name__)

LAYERS_TO_KEEP = ("encoder_layers_to_keep", "decoder_layers_to_keep")
MASK_ENTRIES = (*MASK_BUFFERS, "mask_metadata")  # how the names end of what fairseq's own models do not have


class PrunedModel(NotScriptable):
    """The part of a fairseq model whose attention is pruned by global masks; fairseq's own model class comes after it.

    Parameters have the names of the stock model, so dense checkpoints are a warm start (``--finetune-from-model``).
    Masks are buffers of the attention modules; ``mask_metadata`` holds their provenance as JSON, one character to an
    int64 (integers survive half precision and checkpoint averaging), with the SHA-256 of the masks.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("mask_metadata", torch.zeros(0, dtype=torch.int64))
        self._masks_are_explicit = False
        self._dictionaries: dict[str, str] = {}  # SHA-256 of those of the task whose tokens attention sees
        self._languages: list[str | None] = [None, None]  # source and target, of a task that translates
        self._logged_cache_savings = False
        self._logged_sparsity: dict[str, float] = {}  # effective sparsity of each kind, for the training logs

    # -- building -----------------------------------------------------------------------------------------------------

    @staticmethod
    def take_options(cfg) -> tuple[argparse.Namespace, str | None]:
        """Return the options of a model that is built, and the mask file that it starts with, ``none`` or None.

        The name of the file is erased from the configuration: checkpoints carry the masks themselves, and must not
        depend on a file that may move or change.

        Raises:
            UserError: for ``--ddp-backend fully_sharded`` or ``--quant-noise-scalar``.
        """
        if not isinstance(distributed.fsdp_wrap(nn.Identity(), min_num_params=0), nn.Identity):
            raise UserError(
                "--ddp-backend fully_sharded: pruned models are not trained in shards; leave the flag out (every rank "
                "holds the whole model)"
            )
        path = getattr(cfg, "attention_masks", None)
        _erase_mask_path(cfg)
        flat = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True) if OmegaConf.is_config(cfg) else vars(cfg)
        interpolated = {name for name, value in flat.items() if isinstance(value, str) and value.startswith("${")}
        given = {name: value for name, value in flat.items() if name not in interpolated}
        if noise := given.get("quant_noise_scalar"):
            raise UserError(
                f"--quant-noise-scalar {noise}: fairseq would quantise layers whose weights pruned models also read "
                "directly; leave the flag out"
            )
        return argparse.Namespace(**{**OWN_DEFAULTS, **given}), path

    def start_with(self, options: argparse.Namespace, path: str | None, task) -> None:
        """Set the masks that training starts with: those of a file, or all-ones masks for ``none``.

        Raises:
            ArtifactError: if the masks cannot be read or were made for another architecture or dictionary.
            UserError: if *options* name kinds of attention that the model has not.
        """
        require_kinds(options, architecture(self))
        sides = {"source": task.source_dictionary}
        if architecture(self).keys() != {AttentionKind.ENCODER_SELF.value}:  # else the target may be labels, or none
            sides["target"] = task.target_dictionary
        self._dictionaries = {side: dictionary_sha256(x) for side, x in sides.items() if x is not None}
        self._languages = [getattr(task.cfg, name, None) for name in ("source_lang", "target_lang")]
        if path == "none":
            self.set_masks(PruningMasks.all_ones(architecture(self), self._dictionaries))
            self.prefer_checkpoint_masks()
            logger.info("attention masks: none; every cell is kept, unless a checkpoint brings masks")
        elif path:
            masks = PruningMasks.load(path)
            masks.require_model(architecture(self), self._dictionaries, path)
            self.set_masks(masks, file_sha256(path))
            logger.info(f"attention masks {path}: {describe_sparsity(self.masks_provenance())}")
            self._warn_of_direction(masks.metadata)

    # -- masks --------------------------------------------------------------------------------------------------------

    def set_masks(self, masks: PruningMasks, file_hash: str | None = None) -> None:
        """Give every attention module its mask; a checkpoint loaded afterwards does not replace them."""
        tensors = {name: torch.from_numpy(array) for name, array in masks.packed().items()}
        for (kind, layer), module in attention_sites(self):
            names = ("keep", "extrapolation", "range", "offsets", "geometry", "anchor")
            packed = [tensors.get(f"{kind.value}.{name}") for name in names]
            module.set_mask(*(x if x is None else x.clone() if x.dim() == 1 else x[layer].clone() for x in packed))
        provenance = {**masks.metadata, "file_sha256": file_hash, "masks_sha256": self.masks_sha256()}
        self.mask_metadata = encode_provenance(provenance).to(self.mask_metadata.device)
        self._masks_are_explicit = True
        self._logged_sparsity = effective_sparsity(provenance)

    def prefer_checkpoint_masks(self) -> None:
        """Let the masks of a checkpoint that is loaded from now on replace those of :meth:`set_masks`."""
        self._masks_are_explicit = False
        for _, module in attention_sites(self):
            module.mask_is_explicit = False

    def max_positions(self):
        """As fairseq's, which asks before it trains, validates or translates: the masks must be there by then.

        Raises:
            UserError: if the model has none.
        """
        if not self._has_masks():
            raise UserError(
                "this pruned model has no masks: start training with --attention-masks FILE (of ap-masks), with "
                "--attention-masks none for a dense model, or load a checkpoint that was trained so"
            )
        return super().max_positions()

    def train(self, mode: bool = True):
        forget_packed(self)
        return super().train(mode)

    def prepare_for_onnx_export_(self, **kwargs):
        """fairseq's hook before an export, which is refused."""
        self.__prepare_scriptable__()

    def prepare_for_inference_(self, cfg):
        """fairseq's hook before generation: logs what the masks save in the caches."""
        super().prepare_for_inference_(cfg)
        self.log_cache_savings()

    def log_cache_savings(self) -> None:
        """Log, once, what the masks save in the caches of decoding, if the model decodes and they are not all-ones."""
        prunes = not self._logged_sparsity or any(self._logged_sparsity.values())
        if prunes and not self._logged_cache_savings:
            self._logged_cache_savings = True
            if savings := describe_caches(self):
                logger.info(savings)

    def masks_sha256(self) -> str:
        """Hash the masks themselves, from the buffers."""
        digest = hashlib.sha256()
        for site, module in attention_sites(self):
            digest.update(f"{site.kind.value}.{site.layer}".encode())
            for name in MASK_BUFFERS:
                digest.update(np.ascontiguousarray(getattr(module, name).cpu().numpy()).tobytes())
        return digest.hexdigest()

    def masks_provenance(self) -> dict[str, Any] | None:
        """Return the provenance stored with the masks, or None if the model has no masks.

        Raises:
            ArtifactError: if provenance and masks do not belong together, as after averaging checkpoints with
                different masks; or for masks whose provenance is damaged or missing.
        """
        provenance = decode_provenance(self.mask_metadata)
        if provenance is None and self._has_masks():
            raise ArtifactError(NO_PROVENANCE)
        if provenance is not None and provenance["masks_sha256"] != self.masks_sha256():
            raise ArtifactError(OTHER_MASKS)
        return provenance

    def _has_masks(self) -> bool:
        return any(module.mask_range.any() for _, module in attention_sites(self))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        key = prefix + "mask_metadata"
        stored = state_dict.get(key)
        if stored is not None and not self._masks_are_explicit:
            self.mask_metadata = torch.empty_like(stored, device=self.mask_metadata.device)
        else:
            # --store-ema loads after every update, and hashes of masks take long: the same description, the same masks.
            same = stored is not None and torch.equal(stored.cpu(), self.mask_metadata.cpu())
            if self._masks_are_explicit and not same:
                own = {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
                if lost := lost_masks(own, self.masks_sha256()):
                    logger.warning(
                        f"the masks of --attention-masks replace those of the checkpoint: {lost}; if this resumes "
                        "a training, add --reset-meters, or checkpoint_best.pt may stay one with the old masks"
                    )
            state_dict[key] = self.mask_metadata
        super()._load_from_state_dict(state_dict, prefix, *args)

    def upgrade_state_dict_named(self, state_dict, name):
        drop_bettertransformer_copies(state_dict)
        upgrade_masks(state_dict)
        super().upgrade_state_dict_named(state_dict, name)

    def load_state_dict(self, state_dict, strict=True, model_cfg=None, args=None):
        """As fairseq's, and check that masks, provenance and the task's dictionaries belong together.

        Raises:
            ArtifactError: if they do not. Dictionaries are compared where the checkpoint's masks are taken. With
                LayerDrop at inference time (``encoder_layers_to_keep`` in ``--model-overrides``) only the masks of the
                kept layers are loaded, and not compared with the provenance.
        """
        known = self._holds_same_masks(state_dict)
        if not (known or self._masks_are_explicit):  # before torch compares the sizes of the embeddings
            provenance = decode_provenance(state_dict.get("mask_metadata")) or {}
            self._require_dictionaries(provenance)
            self._warn_of_direction(provenance)
        kept = {name: getattr(model_cfg, name, None) for name in LAYERS_TO_KEEP}  # fairseq erases them
        result = super().load_state_dict(state_dict, strict, model_cfg, args)
        if any(kept.values()) and not self._masks_are_explicit:
            self._leave_out_layers(kept)
        if not (known or self._masks_are_explicit):  # those of a file are logged when they are read
            self._announce_masks()
        return result

    def _require_dictionaries(self, provenance: dict[str, Any]) -> None:
        """Raise ArtifactError where masks that prune were made for other dictionaries; warn where they keep all."""
        recorded = provenance.get("dictionaries", {})
        for side, sha in self._dictionaries.items():
            if recorded.get(side, sha) != sha:
                fault = (
                    f"the checkpoint belongs to a {side} dictionary with SHA-256 {recorded[side][:12]}, the data has "
                    f"{sha[:12]}; name its own data-bin"
                )
                if any(effective_sparsity(provenance).values()):
                    raise ArtifactError(
                        f"{fault}, or, to train it with other words, drop its masks with ap-apply --attention-masks "
                        "none --data DIR"
                    )
                logger.warning(fault)

    def _warn_of_direction(self, provenance: dict[str, Any]) -> None:
        """Log that masks were recorded in another direction, which one dictionary for all languages does not show."""
        recorded = provenance.get("languages")
        if recorded and None not in [*recorded, *self._languages] and recorded != self._languages:
            logger.warning(f"{OTHER_DIRECTION}{' to '.join(recorded)}, the data are {' to '.join(self._languages)}")

    def _holds_same_masks(self, state_dict) -> bool:
        """Whether loading changes no mask: ``--store-ema`` loads after every update."""
        own = {k: v for k, v in self.named_buffers() if k.endswith(MASK_ENTRIES)}
        return self.mask_metadata.numel() > 0 and all(
            key in state_dict and torch.equal(state_dict[key].to(value.device), value) for key, value in own.items()
        )

    def _leave_out_layers(self, kept: dict[str, str | None]) -> None:
        """Make the provenance that of the masks that are left."""
        provenance = decode_provenance(self.mask_metadata)
        if provenance is not None:
            logger.info(f"the masks are those of some layers ({kept}), the effective sparsity is that of all")
            provenance |= {"masks_sha256": self.masks_sha256(), **kept}
            self.mask_metadata = encode_provenance(provenance).to(self.mask_metadata.device)

    def _announce_masks(self) -> None:
        provenance = self.masks_provenance()
        if provenance is None:
            logger.warning("the checkpoint holds no attention masks and --attention-masks names none")
        else:
            logger.info(f"attention masks {provenance['masks_sha256'][:12]}: {describe_sparsity(provenance)}")
        self._logged_sparsity = effective_sparsity(provenance)

    # -- logs ---------------------------------------------------------------------------------------------------------

    def set_num_updates(self, num_updates):
        """fairseq's hook before each training step: adds ``pruned_KIND``, the effective sparsity, to its metrics.

        What is logged inside a training step reaches every progress bar of fairseq: json, simple and tqdm, TensorBoard,
        Weights & Biases, Aim, AzureML.
        """
        super().set_num_updates(num_updates)
        for kind, share in self._logged_sparsity.items():
            metrics.log_scalar(f"pruned_{kind}", share, weight=0, priority=850, round=4)


def _erase_mask_path(cfg) -> None:
    """Set ``attention_masks`` to None in *cfg* and in the run's configuration that it was merged from."""
    cfg.attention_masks = None
    parent = cfg._get_parent() if isinstance(cfg, DictConfig) else None
    if parent is not None and parent.get("model") is not None:
        parent.model.attention_masks = None


def describe_caches(model: PrunedModel) -> str | None:
    """Return what the caches of decoding hold of a target and a source as long as the recorded range of the masks.

    None for a model without a decoder.
    """
    ends: dict[AttentionKind, list[Tensor]] = {AttentionKind.DECODER_SELF: [], AttentionKind.CROSS: []}
    for (kind, _), module in attention_sites(model):
        if kind in ends and not module.is_relative:
            ends[kind].append(module.last_use(*module.mask_range.tolist()))
    alive, positions = peak_share(ends[AttentionKind.DECODER_SELF])
    stored = sum(int((last >= 0).sum()) for last in ends[AttentionKind.CROSS])
    columns = sum(last.numel() for last in ends[AttentionKind.CROSS])
    held = [
        f"{what} {part:,} of {whole:,} {unit} ({1 - part / whole:.1%} less)"
        for what, part, whole, unit in (
            ("decoder self-attention at most", alive, positions, "positions"),
            ("cross-attention", stored, columns, "source columns"),
        )
        if whole
    ]
    if not held:
        return None
    return (
        f"caches hold what a coming mask row of the head keeps: {', '.join(held)}, over all heads and layers, for "
        "texts as long as the recorded range"
    )
