"""Translate a test set with many masks and checkpoints in one process, by fairseq's generators, and measure losses."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fairseq import utils
from fairseq.dataclass.configs import GenerationConfig
from fairseq.tasks.translation import TranslationTask
from fairseq_cli.generate import get_symbols_to_strip_from_output

import ap_fairseq.plugin  # noqa: F401  (registers with fairseq)
from ap_fairseq.artifacts import PruningMasks
from ap_fairseq.devices import device_name, uses_gpu
from ap_fairseq.evaluation.scores import score
from ap_fairseq.files import ArtifactError, file_sha256, read_json, write_json, write_text
from ap_fairseq.model.checkpoints import load_checkpoint
from ap_fairseq.model.conversion import open_with_masks
from ap_fairseq.model.dynamic import DynamicPruning
from ap_fairseq.provenance import versions
from ap_fairseq.search.generator import PrunedSequenceGenerator
from ap_fairseq.sites import attention_sites
from ap_fairseq.tasks import PrunedTranslationTask

VALIDATION = "valid"  # the subset


@dataclass(frozen=True)
class Translation:
    """One system to translate with.

    Attributes:
        output: file to write the detokenised hypotheses to, one line each; beside it, with the suffix ``.json``, what
            made them and the loss on the validation data.
        checkpoint: dense or pruned; all systems of a call have the same architecture and dictionaries.
        masks: file written by ap-masks; it wins over masks in the checkpoint. None: those of the checkpoint.
        dynamic: ``top_k``, ``threshold`` and ``log_bits`` as for :meth:`DynamicPruning.from_options`.
    """

    output: str
    checkpoint: str
    masks: str | None
    dynamic: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Search:
    """How to search.

    Attributes:
        beam: beam size; 0 translates nothing, for the loss alone.
        max_tokens: source tokens of a batch, padding included.
        lenpens: length penalties, as ``fairseq-generate --lenpen`` takes them. Of several, each system translates with
            the one that gives it the best BLEU on the validation data.
        max_len_a, max_len_b: a translation has at most max_len_a * source length + max_len_b tokens.
        fp16: half precision.
        cpu: do not use a GPU.
        on_device: search as the task ``pruned_translation`` does (:mod:`ap_fairseq.search.generator`).
        remove_bpe: how subwords become words, as ``fairseq-generate --remove-bpe`` takes it.
    """

    beam: int = 5
    max_tokens: int = 12000
    lenpens: list[float] = field(default_factory=lambda: [1.0])
    max_len_a: float = 0.0
    max_len_b: int = 200
    fp16: bool = False
    cpu: bool = False
    on_device: bool = False
    remove_bpe: str = "sentencepiece"


def translate(systems: Iterable[Translation], data: str, search: Search, subset: str = "test") -> None:
    """Translate *subset* of the data-bin folder *data* with each system in turn; existing outputs are not repeated.

    The model is built once. Texts are those of ``fairseq-generate`` with the same beam and batches. ``valid_nll`` is
    the negative log-likelihood (base 2, per target token) of the subset ``valid``, as fairseq-validate gives it;
    ``lenpen`` the length penalty of the search, and ``valid_bleu`` the BLEU on ``valid`` with each of several.

    Raises:
        ArtifactError: for files that are missing or do not belong together.
    """
    request = {"search": dataclasses.asdict(search), "subset": subset, "validation": VALIDATION}
    systems = [system for system in systems if not _is_done(system, request)]
    if not systems:
        return
    translator = _Translator(systems[0], data, search, subset)
    for number, system in enumerate(systems):
        print(f"progress: {number} / {len(systems)} systems, {Path(system.output).stem}", flush=True)
        started = time.monotonic()
        document = {
            **translator.measure(system),
            "checkpoint_sha256": file_sha256(system.checkpoint),
            "masks": translator.model.masks_provenance(),
            **request,
            "device": device_name(search.cpu),
            "versions": versions(),
            "seconds": round(time.monotonic() - started, 1),
        }
        write_json(Path(system.output).with_suffix(".json"), document, overwrite=True)


def _is_done(system: Translation, request: dict[str, Any]) -> bool:
    """Whether the output is there; raises :class:`ArtifactError` if something else made it, but for the data folder."""
    path = Path(system.output).with_suffix(".json")
    if not path.exists():
        return False
    made = read_json(path)
    dynamic = {name: value for name, value in made.get("dynamic", {}).items() if name != "sparsity"}
    asked = {key: made.get(key) for key in request}
    asked["search"] = dataclasses.asdict(Search(**asked["search"]))  # with the settings that it did not know then
    then = (made["checkpoint_sha256"], made["masks"]["file_sha256"], dynamic, asked)
    masks = None if system.masks is None else file_sha256(system.masks)
    now = (file_sha256(system.checkpoint), masks, system.dynamic, request)
    if then != now:
        raise ArtifactError(
            f"{system.output} was made from other files or by another search:\n  then {then}\n  now  {now}\nremove "
            f"{path} to translate again, or name another output"
        )
    return True


class _Translator:
    """A model of the sizes of *first* that is built once, and has the weights and masks of each system in turn."""

    def __init__(self, first: Translation, data: str, search: Search, subset: str):
        self.search, self.subset = search, subset
        model, task, _ = open_with_masks(first.checkpoint, first.masks or "none", data)
        if isinstance(task, PrunedTranslationTask):  # it keeps its generator, whose graphs hold the masks of one system
            task = TranslationTask(task.cfg, task.source_dictionary, task.target_dictionary)
        self.loaded = first.checkpoint if first.masks else None  # else without the masks of the checkpoint
        self.device = torch.device("cuda" if uses_gpu(search.cpu) else "cpu")
        self.model = model.to(self.device, torch.float16 if search.fp16 else torch.float32).eval()
        self.model.make_generation_fast_(beamable_mm_beam_size=None, need_attn=False)
        self.task, self.batches = task, {name: self._batches(task, name) for name in (subset, VALIDATION)}

    def _batches(self, task: TranslationTask, subset: str):
        task.load_dataset(subset)
        return task.get_batch_iterator(
            dataset=task.dataset(subset),
            max_tokens=self.search.max_tokens,
            max_positions=utils.resolve_max_positions(task.max_positions(), self.model.max_positions()),
            required_batch_size_multiple=1,
        )

    def _samples(self, subset: str) -> Iterator[dict[str, Any]]:
        for sample in self.batches[subset].next_epoch_itr(shuffle=False):
            yield utils.move_to_cuda(sample, self.device) if self.device.type == "cuda" else sample

    def measure(self, system: Translation) -> dict[str, Any]:
        """Write the translations of a system, if it is to search, and return what is measured of it."""
        self._become(system)
        measured, sparsity = {}, None
        if self.search.beam:
            lenpens, lenpen = self.search.lenpens, self.search.lenpens[0]
            if len(lenpens) > 1:
                found = measured["valid_bleu"] = self._bleu_by_lenpen()
                lenpen = max(lenpens, key=lambda lenpen: found[str(lenpen)])
                self._prune_by_sentence(system)  # counts anew
            measured["lenpen"] = lenpen
            texts = self._translated(self.subset, lenpen)
            lines = "".join(f"{texts[index]}\n" for index in range(len(self.task.dataset(self.subset))))
            write_text(system.output, lines, overwrite=True)
            sparsity = self._dynamic_sparsity()
        measured["valid_nll"] = self._valid_nll()
        if system.dynamic:
            measured["dynamic"] = {**system.dynamic, "sparsity": sparsity or self._dynamic_sparsity()}
        return measured

    def _become(self, system: Translation) -> None:
        """Give the model the weights, the masks and the dynamic pruning of *system*."""
        if system.masks is None:
            self.model.prefer_checkpoint_masks()
        if system.checkpoint != self.loaded or system.masks is None:
            self.model.load_state_dict(load_checkpoint(system.checkpoint)["model"], strict=True)
            self.loaded = system.checkpoint
        if system.masks is not None:
            self.model.set_masks(PruningMasks.load(system.masks), file_sha256(system.masks))
        self._prune_by_sentence(system)

    def _prune_by_sentence(self, system: Translation) -> None:
        for site, module in attention_sites(self.model):
            options = {"top_k": None, "threshold": None, "log_bits": 0, **system.dynamic}
            module.dynamic = DynamicPruning.from_options(site.kind, **options)

    @torch.inference_mode()
    def _valid_nll(self) -> float:
        loss = n_tokens = 0.0
        for sample in self._samples(VALIDATION):
            log_probs = self.model.get_normalized_probs(self.model(**sample["net_input"]), log_probs=True)
            real = sample["target"].ne(self.task.target_dictionary.pad())
            loss -= float(log_probs.gather(2, sample["target"][..., None])[..., 0][real].double().sum())
            n_tokens += int(real.sum())
        return loss / n_tokens / math.log(2)

    def _bleu_by_lenpen(self) -> dict[str, float]:
        """Return the BLEU on the validation data with each length penalty."""
        dataset = self.task.dataset(VALIDATION)
        references = [
            self.task.target_dictionary.string(dataset.tgt[k].tolist(), self.search.remove_bpe, escape_unk=True)
            for k in range(len(dataset))
        ]
        found = {}
        for lenpen in self.search.lenpens:
            texts = self._translated(VALIDATION, lenpen)
            found[str(lenpen)] = score([texts[k] for k in range(len(dataset))], references, ["bleu"])["bleu"]
        return found

    def _translated(self, subset: str, lenpen: float) -> dict[int, str]:
        """Return index in the data set -> text of the best hypothesis."""
        search, dictionary = self.search, self.task.target_dictionary
        lengths = dict(max_len_a=search.max_len_a, max_len_b=search.max_len_b)
        options = GenerationConfig(beam=search.beam, lenpen=lenpen, **lengths)
        # Anew for each system: captured graphs hold the masks that they were captured with.
        generator_class = PrunedSequenceGenerator if search.on_device else None
        generator = self.task.build_generator([self.model], options, generator_class)
        if search.on_device:
            generator.nbest = 1
        ignored, texts = get_symbols_to_strip_from_output(generator), {}
        with torch.inference_mode():
            for sample in self._samples(subset):
                found = self.task.inference_step(generator, [self.model], sample)
                for index, hypotheses in zip(sample["id"].tolist(), found, strict=True):
                    # Not fairseq's post_process_prediction, which adds the words of the text to the dictionary.
                    tokens = hypotheses[0]["tokens"].tolist()  # fairseq goes through a tensor element by element
                    texts[index] = dictionary.string(tokens, search.remove_bpe, extra_symbols_to_ignore=ignored)
        return texts

    def _dynamic_sparsity(self) -> dict[str, dict[str, float]]:
        """Return the effective sparsity of dynamic pruning per kind and over all, of the pairs computed so far."""
        pairs: dict[str, list[int]] = {}
        for site, module in attention_sites(self.model):
            if module.dynamic is not None:
                for name in (site.kind.value, "total"):
                    total = pairs.setdefault(name, [0, 0])
                    total[0] += int(module.dynamic.pairs)
                    total[1] += int(module.dynamic.kept)
        return {name: {"effective": 1 - kept / seen} for name, (seen, kept) in pairs.items()}
