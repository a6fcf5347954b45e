"""``ap-prune-schedule``: prune in rounds, each of which records the current model, derives masks and trains on."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from fairseq import options, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.cli.common import command, without_usage
from ap_fairseq.cli.masks import write_masks
from ap_fairseq.cli.user_dir import import_user_dir, user_dir_of
from ap_fairseq.data_bin import setup_task
from ap_fairseq.experiments.stages import PLUGIN, Stages
from ap_fairseq.files import UserError, require_file
from ap_fairseq.model.conversion import open_with_masks
from ap_fairseq.plugin import require_own_task_and_architecture
from ap_fairseq.provenance import describe_sparsity, dictionary_files
from ap_fairseq.pruning.flags import (
    allow_flag_values,
    budget_flags,
    parse_mask_flags,
    require_fitting,
    spec_from,
    split_flags,
)
from ap_fairseq.sites import AttentionKind, architecture
from ap_fairseq.training.schedule import SHAPES, share_of_round

logger = logging.getLogger(__name__)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Prune gradually: in each round, record the attention of the current model, derive masks for a "
        "growing share of the budgets, and train on under them. Finished stages are skipped when the same command runs "
        "again.",
        epilog="Everything after -- goes to fairseq-train: sizes (--arch pruned_transformer...), optimizer, "
        "--max-tokens, but no --save-dir, --max-update, --attention-masks or --finetune-from-model. Learning rates "
        "start over in each round: give a decay (--total-num-update) the updates of one round, --updates / --rounds.",
    )
    parser.add_argument("data", help="binarised data (fairseq-preprocess)")
    parser.add_argument("--path", required=True, metavar="CHECKPOINT", help="dense or pruned checkpoint to start from")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="number of rounds (default: %(default)s)")
    parser.add_argument("--updates", type=int, required=True, metavar="N", help="updates of all rounds together")
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default="cubic",
        help="growth of the budgets: cubic prunes most in the first rounds (Zhu and Gupta 2017, arXiv 1710.01878) "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--masks",
        required=True,
        metavar="FLAGS",
        help="flags of ap-masks in one argument, with the last round's budgets, e.g. '--total 0.9'",
    )
    parser.add_argument(
        "--record",
        default="--max-tokens 12000",
        metavar="FLAGS",
        help="flags of ap-record in one argument, e.g. '--fp16 --max-tokens 16384' (default: '%(default)s')",
    )
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder of the rounds")
    allow_flag_values(parser, "--masks", "--record")
    return parser


def write_round_masks(stats_file: str, output: str, flags: Sequence[str], share: float) -> None:
    """Build the masks of one round: those of the ap-masks *flags* for a *share* of their budgets."""
    stats = AttentionStats.load(stats_file)
    write_masks(stats, spec_from(parse_mask_flags(flags, "--masks"), stats), output, overwrite=True, share=share)


def prune_gradually(
    data: str,
    checkpoint: str,
    output: str,
    mask_flags: Sequence[str],
    train_flags: Sequence[str],
    record_flags: Sequence[str],
    rounds: int,
    updates: int,
    shape: str = "cubic",
) -> tuple[str, str]:
    """Run the schedule; see the module's command.

    Returns:
        The last checkpoint and the last masks.
    """
    stages, current, masks = Stages(output), str(checkpoint), ""
    for number in range(1, rounds + 1):
        folder = Path(output) / f"round-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        stats, masks = str(folder / "stats.safetensors"), str(folder / "masks.safetensors")
        recording = ["--path", current, "--subset", "train", "-o", stats, "--overwrite", *record_flags]
        stages.run(f"round-{number}.record", "ap-record", data, *recording)
        share = share_of_round(number, rounds, shape)
        stages.run(f"round-{number}.masks", write_round_masks, stats, masks, list(mask_flags), share)
        round_updates = updates * number // rounds - updates * (number - 1) // rounds
        own = ["--attention-masks", masks, "--finetune-from-model", current, "--save-dir", str(folder)]
        training = [*train_flags, *own, "--max-update", round_updates]
        stages.run(f"round-{number}.train", "fairseq-train", data, *PLUGIN, *training)
        current = str(folder / "checkpoint_last.pt")
    return current, masks


def require_flags(data: str, checkpoint: str, mask_flags: Sequence[str], train_flags: Sequence[str], user_dir) -> None:
    """Raise :class:`UserError` for flags that would stop a round after its recording.

    Args:
        user_dir: the user's own plugin, if the checkpoint needs one.
    """
    require_own_task_and_architecture([*train_flags, "--attention-masks", "none"])
    parser = options.get_training_parser()

    def refuse(message: str):
        raise UserError(f"fairseq-train flags after --: {message}")

    parser.error = lambda message: refuse(f"{message}; all flags: fairseq-train --help")
    train = options.parse_args_and_arch(parser, [data, *PLUGIN, *train_flags, "--attention-masks", "none"])
    import_user_dir(user_dir)
    if not dictionary_files(utils.split_paths(data)[0]):
        raise UserError(f"{data} holds no dictionaries (dict.*.txt); give the folder that fairseq-preprocess made")
    model, *_ = open_with_masks(checkpoint, "none", data)
    cfg = convert_namespace_to_omegaconf(train)
    trained = setup_task(cfg.task).build_model(cfg.model)
    shapes, given = ({name: list(x.shape) for name, x in one.named_parameters()} for one in (model, trained))
    if other := [name for name in {**shapes, **given} if shapes.get(name) != given.get(name)]:
        refuse(
            f"their model is not that of {checkpoint}: {other[0]} is {given.get(other[0])} there and "
            f"{shapes.get(other[0])} in the checkpoint; give the sizes with which that was trained"
        )
    sizes = architecture(model)
    held_out = AttentionKind.CROSS in sizes and any(Path(data).glob("valid.*"))
    require_fitting(parse_mask_flags(mask_flags, "--masks"), sizes, held_out)


@command
def main(argv: list[str]) -> None:
    split = argv.index("--") if "--" in argv else len(argv)
    own, train_flags = argv[:split], argv[split + 1 :]
    args = without_usage(get_parser()).parse_args(own)
    require_file(args.path, "a fairseq checkpoint")
    if not 1 <= args.rounds <= args.updates:
        raise UserError(f"--rounds {args.rounds} and --updates {args.updates}: each round needs an update")
    given = {flag.split("=")[0] for flag in train_flags}
    taken = {"--save-dir", "--max-update", "--attention-masks", "--finetune-from-model", "--attention-sparsity"} & given
    taken |= {flag for flag in given if flag.startswith("--prune-")}  # masks of its own would replace those of a round
    if taken or not {"--arch", "-a"} & given:
        fault = f"{', '.join(sorted(taken))} given" if taken else "no --arch given"
        raise UserError(f"fairseq-train flags after --: {fault}; give --arch, and leave the others to the rounds")
    mask_flags, record_flags = split_flags("--masks", args.masks), split_flags("--record", args.record)
    parsed = parse_mask_flags(mask_flags, "--masks")
    if len(budget_flags(parsed)) != 1:
        raise UserError(
            f"--masks '{args.masks}' must give one kind of budget: --total, --like, or those of attention kinds"
        )
    if parsed.criterion == "importance" and "--importance" not in record_flags:
        raise UserError(f"--masks '{args.masks}' ranks by importance, but --record '{args.record}' lacks --importance")
    require_flags(args.data, args.path, mask_flags, train_flags, user_dir_of(record_flags))
    checkpoint, masks = prune_gradually(
        *(args.data, args.path, args.output, mask_flags, train_flags, record_flags),
        *(args.rounds, args.updates, args.shape),
    )
    logger.info(f"{describe_sparsity(PruningMasks.load(masks).metadata)} -> {checkpoint}, masks {masks}")


if __name__ == "__main__":
    main()
