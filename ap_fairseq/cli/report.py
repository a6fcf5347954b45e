"""``ap-report``: page, figures, tables and exports of statistics, masks and scores."""

from __future__ import annotations

import argparse
import logging

from ap_fairseq.artifacts import AttentionStats
from ap_fairseq.cli.common import add_output, command, without_usage
from ap_fairseq.files import refuse_existing
from ap_fairseq.report import build
from ap_fairseq.report.export import FORMATS, export

logger = logging.getLogger(__name__)

_REPORT_FILES = ["report.html", "summary.json", "table.md", "table.tex", "figures"]


def _stats_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stats", nargs="+", required=True, metavar="FILE", help="files written by ap-record; several are merged"
    )


def _input_options(parser: argparse.ArgumentParser) -> None:
    _stats_option(parser)
    parser.add_argument(
        "--masks",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="masks made from these statistics (ap-masks)",
    )
    parser.add_argument(
        "--results",
        nargs="+",
        action="extend",
        default=[],
        metavar="JSON",
        help="scores: files of ap-evaluate -o, or JSON lines with one system each",
    )
    parser.add_argument("--benchmark", metavar="JSON", help="file of scripts/bench_attention.py: adds speed and memory")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="output folder; created if missing")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the files of an earlier report in this folder"
    )


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write a report on recorded attention and pruning masks: report.html (one file, opens from disk), "
        "figures/*.png and *.svg, summary.json, table.md, table.tex.",
        epilog="Further commands: 'ap-report figures' writes the figures alone, 'ap-report export' writes the mean "
        "attention for numpy or BertViz-style tools; each has its own --help.",
    )
    _input_options(parser)
    return parser


def get_figures_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ap-report figures", description="Write only the figures of the report, as PNG and SVG."
    )
    _input_options(parser)
    return parser


def get_export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ap-report export", description="Write the mean attention of every layer and head for other tools."
    )
    _stats_option(parser)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="npz: numpy arrays; bertviz-json: the arguments of BertViz's views (default: %(default)s)",
    )
    parser.add_argument("--positions", type=int, metavar="N", help="only positions below N (default: all recorded)")
    add_output(parser, "the mean attention")
    return parser


def _export(argv: list[str]) -> None:
    args = without_usage(get_export_parser()).parse_args(argv)
    refuse_existing(args.output, args.overwrite, args.stats)
    export(AttentionStats.load_merged(args.stats), args.output, args.format, args.positions, args.overwrite)
    logger.info(f"mean attention -> {args.output}")


def _figures(argv: list[str]) -> None:
    args = without_usage(get_figures_parser()).parse_args(argv)
    report = build.load(args.stats, args.masks, args.results, args.benchmark)
    figures = report.figures()
    names = [f"{figure.name}.{ending}" for figure in figures for ending in ("png", "svg")]
    folder = build.check_folder(args.output, names, args.overwrite)
    build.write_figures(figures, folder)
    logger.info(f"{len(figures)} figures -> {folder}")


def _report(argv: list[str]) -> None:
    args = without_usage(get_parser()).parse_args(argv)
    folder = build.check_folder(args.output, _REPORT_FILES, args.overwrite)
    report = build.load(args.stats, args.masks, args.results, args.benchmark)
    build.write_report(report, folder)
    print(*report.digest, f"report: {folder / 'report.html'}", sep="\n")


@command
def main(argv: list[str]) -> None:
    commands = {"figures": _figures, "export": _export}
    if argv and argv[0] in commands:
        commands[argv[0]](argv[1:])
    else:
        _report(argv)


if __name__ == "__main__":
    main()
