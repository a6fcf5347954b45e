"""What this package patches in fairseq and in torch's loader, and what differs between their releases."""

from __future__ import annotations

import argparse
import atexit
import collections
import contextlib
import functools
import importlib
import os
import re
import types
import typing
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

_BETTERTRANSFORMER_KEY = re.compile(r"(^|[._])encoder\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)$")


def require_fairseq() -> None:
    """Raise ImportError with the remedy unless a fairseq with the API that this plugin uses can be imported."""
    remedy = "install it with: pip install 've-fairseq>=0.12.3' (it replaces the fairseq package on Python >= 3.11)"
    try:
        transformer = importlib.import_module("fairseq.models.transformer")
    except Exception as error:
        raise ImportError(f"ap_fairseq needs fairseq, whose import failed with {error!r}; {remedy}") from error
    missing = [
        name
        for name in ("TransformerConfig", "TransformerEncoderBase", "TransformerDecoderBase", "TransformerModelBase")
        if not hasattr(transformer, name)
    ]
    if missing:
        import fairseq

        raise ImportError(f"fairseq {fairseq.__version__} lacks {', '.join(missing)}; {remedy}")


def allow_fairseq_checkpoints() -> None:
    """Tell torch's safe loader (``weights_only=True``) which harmless types fairseq stores in checkpoints.

    Plain runs hold a Namespace; ``--eval-bleu`` runs numpy scalars; resuming on several ranks passes the whole
    OmegaConf tree and a tensor placeholder through the loader.
    """
    from fairseq.distributed.utils import _TensorPlaceholder
    from omegaconf import DictConfig, ListConfig
    from omegaconf.base import ContainerMetadata, Metadata
    from omegaconf.nodes import AnyNode

    reconstruct = np.array(0).__reduce__()[0]  # numpy's own name for it moved between releases
    torch.serialization.add_safe_globals(
        [argparse.Namespace]
        + [np.ndarray, np.dtype, np.dtypes.Int64DType, np.dtypes.Float64DType, reconstruct]
        + [DictConfig, ListConfig, ContainerMetadata, Metadata, AnyNode]
        + [typing.Any, dict, list, int, collections.defaultdict, _TensorPlaceholder]
    )


def hide_notices_of_hydra() -> None:
    """Hide what hydra says of fairseq's use of it: 25 lines at the start of a command, which no user can act on."""
    warnings.filterwarnings("ignore", module=r"hydra\.")
    warnings.filterwarnings("ignore", r"\s*'config' is validated against ConfigStore schema")  # at the caller's line


def patch_ema_integers() -> None:
    """Let ``--store-ema`` copy integer buffers, such as masks: their average has no meaning and no type.

    fairseq's EMA takes the keys to copy as an argument, which its trainer does not pass, and refuses those whose shape
    has changed, as that of masks does when a training prunes.
    """
    from fairseq.models.ema.ema import EMA

    stock, stock_step = EMA.__init__, EMA._step_internal

    @functools.wraps(stock)
    def init(self, model, config, device=None, skip_keys=None):
        tensors = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        integers = {key for key, value in tensors.items() if not value.is_floating_point()}
        stock(self, model, config, device, integers | set(skip_keys or ()))

    @functools.wraps(stock_step)
    def step(self, new_model, updates=None):
        copied = {key: value for key, value in new_model.state_dict().items() if key in self.skip_keys}
        own = self.model.state_dict()
        if any(value.shape != own[key].shape for key, value in copied.items()):
            self.restore(copied)
            if self.config.ema_fp32:
                self.fp32_params |= copied
        stock_step(self, new_model, updates)

    EMA.__init__, EMA._step_internal = init, step


def patch_gloo_shutdown() -> None:
    """Let a rank on a CPU join gloo's threads before Python ends; fairseq leaves its process groups open.

    A thread that still holds the tensors of the last collective needs the interpreter to let them go (torch >= 2.10),
    and without one it aborts the process, with everything done and written: "terminate called without an active
    exception", exit status 134.
    """

    @atexit.register
    def end() -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_backend() == "gloo":
                torch.distributed.destroy_process_group()


def patch_ranks() -> None:
    """Let fairseq take its ranks from ``torchrun`` on hosts with one GPU, and from it or SLURM without any.

    It looks for them only if ``--distributed-world-size`` is above 1, by default the number of GPUs of the host: else
    every rank would train alone and write the same files. Without a GPU it divides the rank by zero GPUs.
    """
    from fairseq.distributed import utils as distributed

    stock = distributed.infer_init_method

    @functools.wraps(stock)
    def infer_init_method(cfg, force_distributed=False):
        launched = {"MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"} <= os.environ.keys()
        if launched and cfg.distributed_init_method is None:
            cfg.distributed_world_size = int(os.environ["WORLD_SIZE"])
        several = cfg.distributed_init_method is None and cfg.distributed_world_size > 1
        if torch.cuda.is_available() or not several:
            stock(cfg, force_distributed)
        elif launched:
            cfg.distributed_init_method = "env://"
            cfg.distributed_rank = int(os.environ["RANK"])
            cfg.distributed_no_spawn = True
        elif distributed._infer_slurm_init(cfg, None):
            cfg.device_id = 0
        else:
            stock(cfg, force_distributed)

    distributed.infer_init_method = infer_init_method


def patch_user_dir() -> None:
    """Let ``--user-dir`` name this package when it is imported already, under any path or as ``ap_fairseq``."""
    from fairseq import utils

    stock = utils.import_user_module
    here = Path(__file__).resolve().parent

    @functools.wraps(stock)
    def import_user_module(args):
        given = Path(getattr(args, "user_dir", None) or "/")
        if given.resolve() != here and (given.exists() or given != Path(here.name)):
            stock(args)

    utils.import_user_module = import_user_module


def patch_numpy_long() -> None:
    """Give numpy >= 2.4 its old name of an integer type, by which fairseq cuts text at ends of sentences."""
    if not hasattr(np, "compat"):
        np.compat = types.SimpleNamespace(long=int)  # noqa: NPY201


def patch_alignment_generators() -> None:
    """Let pruned decoders compute attention weights for ``--print-alignment``, and for nothing else.

    Stock decoders compute them in every pass outside of training. That fairseq prepares a model for generation with or
    without them does not tell who reads them: the hub prepares it once for all calls.
    """
    from fairseq.sequence_generator import SequenceGeneratorWithAlignment
    from fairseq.sequence_scorer import SequenceScorer

    def wrap(generator: type, readers: Callable) -> None:
        stock = generator.generate

        @functools.wraps(stock)
        def generate(self, models, sample, **kwargs):
            with contextlib.ExitStack() as stack:
                for decoder in [getattr(model, "decoder", None) for model in readers(self, models)]:
                    if hasattr(decoder, "alignment_needed"):
                        decoder.alignment_needed = True
                        stack.callback(setattr, decoder, "alignment_needed", False)
                return stock(self, models, sample, **kwargs)

        generator.generate = generate

    wrap(SequenceGeneratorWithAlignment, lambda generator, models: generator.model.models)
    wrap(SequenceScorer, lambda scorer, models: models if scorer.compute_alignment else ())


def drop_bettertransformer_copies(state_dict: dict) -> None:
    """Remove the keys that official fairseq 0.12.2 adds to every encoder layer, in place.

    They are zero-filled parameters of torch's "BetterTransformer" fast path, which hold nothing of the model, and other
    releases refuse them as unexpected.
    """
    for key in [key for key in state_dict if _BETTERTRANSFORMER_KEY.search(key)]:
        del state_dict[key]
