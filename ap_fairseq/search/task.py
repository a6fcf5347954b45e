"""What tasks that search on the device share."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.data import Dictionary, data_utils
from fairseq.dataclass import FairseqDataclass
from fairseq.tokenizer import tokenize_line

from ap_fairseq.data_bin import load_dictionary
from ap_fairseq.files import UserError
from ap_fairseq.search.alignment import PrunedSequenceGeneratorWithAlignment
from ap_fairseq.search.generator import PrunedSequenceGenerator
from ap_fairseq.search.running import host_copy


@dataclass
class SearchOnDeviceConfig(FairseqDataclass):
    """How a task searches."""

    cpu_int8: bool = field(
        default=False,
        metadata={"help": "on a CPU, translate with linear layers in 8-bit integers: faster, and a little less exact"},
    )


class ListDictionary(Dictionary):
    """A dictionary that goes through lists: fairseq's goes through tensors element by element, many times as slow."""

    def string(
        self,
        tensor,
        bpe_symbol=None,
        escape_unk=False,
        extra_symbols_to_ignore=None,
        unk_string=None,
        include_eos=False,
        separator=" ",
    ) -> str:
        tokens = tensor.tolist() if torch.is_tensor(tensor) and tensor.dim() == 1 else tensor
        if not isinstance(tokens, list) or not {*map(type, tokens)} <= {int}:
            options = escape_unk, extra_symbols_to_ignore, unk_string, include_eos, separator
            return super().string(tensor, bpe_symbol, *options)
        ignored = {*(extra_symbols_to_ignore or ()), self.bos(), *(() if include_eos else (self.eos(),))}
        unknown = self.unk_string(escape_unk) if unk_string is None else unk_string
        unk, symbols, size = self.unk_index, self.symbols, len(self.symbols)
        words = [unknown if i == unk else symbols[i] if i < size else self.unk_word for i in tokens if i not in ignored]
        return data_utils.post_process(separator.join(words), bpe_symbol)

    def encode_line(
        self,
        line,
        line_tokenizer=tokenize_line,
        add_if_not_exist=True,
        consumer=None,
        append_eos=True,
        reverse_order=False,
    ) -> torch.IntTensor:
        if consumer is not None or reverse_order:
            options = add_if_not_exist, consumer, append_eos, reverse_order
            return super().encode_line(line, line_tokenizer, *options)
        words = line.split() if line_tokenizer is tokenize_line else line_tokenizer(line)  # the same words
        if add_if_not_exist:
            numbers = [self.add_symbol(word) for word in words]
        else:
            find, unknown = self.indices.get, self.unk_index
            numbers = [find(word, unknown) for word in words]
        return torch.IntTensor(numbers + [self.eos_index] * append_eos)


class SearchOnDevice:
    """The part of a task whose search is decided on the device; fairseq's own task class comes after it."""

    _built: tuple[tuple, Any] | None = None  # what the last generator was built for, and that generator

    @classmethod
    def load_dictionary(cls, filename: str) -> Dictionary:
        return load_dictionary(ListDictionary, filename)

    def build_generator(self, models, args, seq_gen_cls=None, extra_gen_cls_kwargs=None, prefix_allowed_tokens_fn=None):
        """As fairseq's. The same call gives the same generator, with its buffers: the hub asks in every translation.

        Raises:
            UserError: if ``--cpu-int8`` is given with what searches in another way, or in training.
        """
        cpu_int8 = getattr(self.cfg, "cpu_int8", False)  # fairseq's own configuration has none
        if cpu_int8 and getattr(self.cfg, "eval_bleu", False):
            raise UserError("--cpu-int8 with --eval-bleu: the model that trains cannot have 8-bit layers; leave it out")
        if cpu_int8 and (seq_gen_cls is not None or getattr(args, "score_reference", False)):
            other = f"the search of {seq_gen_cls.__name__}" if seq_gen_cls else "--score-reference"
            raise UserError(f"--cpu-int8 with {other}, which has no 8-bit layers; leave one of them out")
        if seq_gen_cls is None and getattr(args, "print_alignment", False):
            seq_gen_cls = PrunedSequenceGeneratorWithAlignment
            extra_gen_cls_kwargs = {**(extra_gen_cls_kwargs or {}), "print_alignment": args.print_alignment}
        elif seq_gen_cls is None:
            seq_gen_cls = PrunedSequenceGenerator
        if cpu_int8:
            extra_gen_cls_kwargs = {**(extra_gen_cls_kwargs or {}), "cpu_int8": True}
        options = seq_gen_cls, extra_gen_cls_kwargs, prefix_allowed_tokens_fn
        wanted = [id(model) for model in models], copy.deepcopy(args), options
        built = self._built
        if built is None or built[0] != wanted:
            built = self._built = wanted, super().build_generator(models, args, *options)
        return built[1]  # not the attribute, which another thread may have replaced

    def inference_step(self, generator, models, sample, prefix_tokens=None, constraints=None):
        """As fairseq's, but source, target and numbers of *sample* are on the host afterwards, where hypotheses are.

        fairseq's commands print them token by token, and each would wait for the device.
        """
        places = [(sample["net_input"], "src_tokens"), (sample, "target"), (sample, "id")]
        on_host = [(part, name, host_copy(part[name])) for part, name in places if torch.is_tensor(part.get(name))]
        found = super().inference_step(generator, models, sample, prefix_tokens, constraints)
        for part, name, wait in on_host:
            part[name] = wait()
        return found
