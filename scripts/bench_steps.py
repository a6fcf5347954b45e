"""Time single steps of a search, and whole sentences, on a GPU: a random transformer_iwslt_de_en in float16, beam 5.

    python scripts/bench_steps.py --out bench_steps.json
    python scripts/bench_steps.py --table scripts/bench_steps.h200.json     # Markdown, no GPU needed

Fused: the decoder is `FusedDecoder`, and what comes before the steps is a `SourcePass`; modules: neither. Sentences
have 25 tokens, and their translations 30.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time

import torch
import triton
from fairseq.data import Dictionary
from result_files import add_result_options, git_commit, print_table, require_writable, write_report

from ap_fairseq.evaluation.tables import Table, markdown
from ap_fairseq.model.config import PrunedTransformerConfig
from ap_fairseq.model.transformer import PrunedTransformerModel
from ap_fairseq.search import fused_decoder
from ap_fairseq.search.beams import BeamSearchState
from ap_fairseq.search.generator import PrunedSequenceGenerator

VOCAB_SIZE, SOURCE, TARGET, BEAM = 10_000, 25, 30, 5
STEP = 20  # the one that is timed


def make_model() -> tuple[PrunedTransformerModel, Dictionary]:
    vocab = Dictionary()
    for number in range(VOCAB_SIZE - len(vocab)):
        vocab.add_symbol(f"w{number}")
    cfg = argparse.Namespace(left_pad_target=False)
    task = argparse.Namespace(cfg=cfg, source_dictionary=vocab, target_dictionary=vocab)
    sizes = dict(embed_dim=512, ffn_embed_dim=1024, attention_heads=4, layers=6)
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sizes.items()}
    torch.manual_seed(1)
    options = PrunedTransformerConfig(attention_masks="none", decoder_input_dim=512, decoder_output_dim=512, **sides)
    return PrunedTransformerModel.build_model(options, task).to("cuda", torch.float16).eval(), vocab


def kernels(graph: torch.cuda.CUDAGraph) -> int:
    """Count those of a replay."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        graph.replay()
        torch.cuda.synchronize()
    return sum(event.device_time > 0 for event in trace.events())


def median_step(graph: torch.cuda.CUDAGraph, beams: BeamSearchState, repeats: int) -> float:
    """Return the microseconds of a step, as a replay of its graph."""
    steps, used = [], beams.used.clone()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(repeats):
        beams.used.copy_(used // 2)  # a replay takes slots, and counts a step
        beams.state.step.fill_(STEP)
        torch.cuda.synchronize()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        steps.append(start.elapsed_time(end) * 1e3)
    beams.state.step.fill_(STEP)
    return statistics.median(steps)


def measure(system, vocab: Dictionary, n: int, fused: bool, repeats: int) -> dict:
    """Time a step, as a replay of its graph, and the search of a batch of *n* sentences."""
    generator = PrunedSequenceGenerator([system], vocab, beam_size=BEAM, max_len_b=TARGET, min_len=TARGET)
    source = torch.randint(vocab.nspecial, len(vocab), (n, SOURCE), generator=torch.Generator().manual_seed(2)).cuda()
    source[:, -1] = vocab.eos()
    batch = {"net_input": {"src_tokens": source, "src_lengths": torch.full((n,), SOURCE, device="cuda")}}
    generator.generate([], batch)
    decoder = generator.decoder
    if not fused:
        decoder.repeats_sources = False
    for _ in range(3):
        found = generator.generate([], batch)
    searches = []
    for _ in range(repeats):
        begin = time.perf_counter()
        generator.generate([], batch)
        searches.append((time.perf_counter() - begin) * 1e3)
    graph, search = decoder.graphs[n, False], statistics.median(searches)
    step = median_step(graph, decoder.beams, 3 * repeats)
    return dict(
        sentences=n,
        decoder="fused" if fused else "modules",
        step_us=round(step, 1),
        kernels=kernels(graph),
        search_ms=round(search, 2),
        tokens_per_second=round(n * (TARGET + 1) / search * 1e3),
        hypotheses=[hypotheses[0]["tokens"].tolist() for hypotheses in found],
    )


def table(report: dict) -> str:
    """Two Markdown rows for each number of sentences."""
    header = ["sentences", "decoder", "kernels of a step", "step, us", "search, ms", "tokens/s", "same hypotheses"]
    rows = [
        [
            *(str(row[name]) for name in ("sentences", "decoder", "kernels")), f"{row['step_us']:.0f}",
            f"{row['search_ms']:.1f}", f"{row['tokens_per_second']:,}", str(row["same_hypotheses"]),
        ]
        for row in report["rows"]
    ]  # fmt: skip
    versions = ", ".join(f"{name} {report['versions'][name]}" for name in ("torch", "triton"))
    made = f"{report['device']}, {versions}, commit {report['commit']}: `{report['command']}`"
    return f"{made}\n\n{markdown(Table(header, rows, align='rlrrrrr'))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, nargs="+", default=[1, 2, 4, 6], help="in a batch")
    parser.add_argument("--repeats", type=int, default=20)
    add_result_options(parser)
    args = parser.parse_args()
    if args.table:
        print_table(parser, args.table, table)
        return
    require_writable(parser, args.out)
    logging.disable(logging.INFO)
    system, vocab = make_model()
    serves, rows = fused_decoder.serves, []
    for n in args.sentences:
        pair = []
        for fused in (True, False):
            fused_decoder.serves = serves if fused else lambda *_: False
            pair.append(measure(system, vocab, n, fused, args.repeats))
        same = sum(a == b for a, b in zip(*(row.pop("hypotheses") for row in pair), strict=True))
        for row in pair:
            rows.append(row | dict(same_hypotheses=same))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    report = dict(
        device=torch.cuda.get_device_name(),
        versions=dict(torch=torch.__version__, triton=triton.__version__, python=sys.version.split()[0]),
        commit=git_commit(),
        command=" ".join(["python", "scripts/bench_steps.py", *sys.argv[1:]]),
        rows=rows,
    )
    if args.out:
        write_report(args.out, report)
    print(table(report))


if __name__ == "__main__":
    main()
