#!/usr/bin/env python
"""Translate a file of subwords with CTranslate2: the whole command of its users, which bench_commands.py times.

    python scripts/translate_ctranslate2.py MODEL SOURCE OUTPUT --workers 4 --max-tokens 4096

MODEL is a folder of CTranslate2's converter. It reads, batches, translates and writes in C++. The search is that of
fairseq-generate --beam 5.
"""

from __future__ import annotations

import argparse

import ctranslate2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("source")
    parser.add_argument("output")
    parser.add_argument("--workers", type=int, default=4, help="that translate at the same time; default: 4")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of a batch; default: 4096")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    translator = ctranslate2.Translator(
        args.model,
        device="cpu" if args.cpu else "cuda",
        compute_type="float32" if args.cpu else "float16",
        inter_threads=args.workers,
    )
    translator.translate_file(
        args.source,
        args.output,
        max_batch_size=args.max_tokens,
        batch_type="tokens",
        beam_size=5,
        max_input_length=0,
        max_decoding_length=200,
    )


if __name__ == "__main__":
    main()
