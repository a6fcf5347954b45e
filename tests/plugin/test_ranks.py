"""Several ranks: two gloo processes on the CPU record, train and resume as one process does.

fairseq infers the ranks from the variables of torchrun or SLURM; without a GPU it divided the rank by zero GPUs, and
under torchrun without --distributed-world-size every rank trained alone.
"""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from plugin.commands import TINY, generate, run, run_process

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.cli import record
from ap_fairseq.evaluation.hypotheses import read_hypotheses
from ap_fairseq.files import ArtifactError
from ap_fairseq.model.attention import MASK_BUFFERS
from ap_fairseq.model.checkpoints import load_checkpoint
from ap_fairseq.recording.run import record_on_rank
from ap_fairseq.sites import AttentionKind

RANKS = 2
GLOO = ["--distributed-world-size", str(RANKS), "--distributed-backend", "gloo"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(command, environment) -> subprocess.Popen:
    return subprocess.Popen(
        [str(Path(sys.executable).parent / command[0]), *map(str, command[1:]), *GLOO],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def start_ranks(*command) -> list[subprocess.Popen]:
    """Start two ranks by fairseq's own flags: without a GPU it spawns none."""
    init = ["--distributed-init-method", f"tcp://127.0.0.1:{free_port()}", "--distributed-no-spawn"]
    return [start([*command, *init, "--distributed-rank", rank], {}) for rank in range(RANKS)]


def run_torchrun(*command, **kwargs) -> str:
    """Run a command as two ranks under torchrun; return the log of both."""
    executable = Path(sys.executable).parent / command[0]
    launcher = ["torchrun", "--standalone", "--nproc-per-node", RANKS, "--no-python", executable]
    return run_process(*launcher, *command[1:], "--distributed-backend", "gloo", **kwargs)


def run_slurm(folder: Path, *command) -> str:
    """Run a command as two ranks with the variables that srun sets; return the log of rank 0."""
    scontrol = folder / "scontrol"  # what fairseq asks for the names of the hosts
    scontrol.write_text("#!/bin/sh\necho 127.0.0.1\n")
    scontrol.chmod(0o755)
    job = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "SLURM_STEP_NODELIST": "node[1]", "SLURM_NNODES": "1"}
    job["SLURM_NTASKS_PER_NODE"] = str(RANKS)
    command = [*command, "--distributed-port", free_port()]
    ranks = [start(command, {**job, "SLURM_PROCID": str(k), "SLURM_LOCALID": str(k)}) for k in range(RANKS)]
    logs = [rank.communicate(timeout=300)[0] for rank in ranks]
    for rank, log in zip(ranks, logs, strict=True):
        assert rank.returncode == 0, log[-4000:]
    return logs[0]


def record_command(data_bin, dense, output, *flags):
    return ["ap-record", data_bin, "--path", dense, "-o", output, "--cpu", "--num-workers", 0, *flags]


def test_two_ranks_record_what_one_records(data_bin, dense, tmp_path):
    """To float64 rounding, as both see the same batches. 77 sentences by 32 make three: one rank gets an empty one."""
    flags = ["--importance", "--batch-size", 32, "--sample", 77]
    run(*record_command(data_bin, dense, tmp_path / "one", *flags))
    log = run_torchrun(*record_command(data_bin, dense, tmp_path / "two", *flags))
    one, two = (AttentionStats.load(tmp_path / name) for name in ("one", "two"))
    assert two.metadata == one.metadata
    assert two.metadata["sentences"] == 77 and two.metadata["sample"] == {"sentences": 77, "seed": 1}
    for kind in AttentionKind:
        np.testing.assert_array_equal(two.support[kind], one.support[kind])
        np.testing.assert_allclose(two.mass[kind], one.mass[kind], rtol=1e-13)
        np.testing.assert_allclose(two.importance[kind], one.importance[kind], rtol=1e-13)
        assert one.importance[kind].sum() > 0
    assert one.metadata["loss"] == "LabelSmoothedCrossEntropyCriterion"
    assert re.search(r"valid on 'train' subset \| loss [\d.]+", log)


def train_command(data_bin, folder, updates, *flags):
    options = "--optimizer adam --lr 1e-3 --lr-scheduler fixed --criterion label_smoothed_cross_entropy --cpu --seed 7"
    options += " --label-smoothing 0.1 --max-tokens 1000 --num-workers 0 --no-epoch-checkpoints --log-format json"
    options += " --log-interval 1 --ddp-backend legacy_ddp"  # pytorch_ddp wants a GPU
    return [
        *["fairseq-train", data_bin, "--arch", "pruned_transformer", *TINY, "--save-dir", folder],
        *["--max-update", updates, *options.split(), *flags],
    ]


def saving_plugin(folder: Path) -> Path:
    """A --user-dir that also saves, after each update, what each rank holds: fairseq itself writes rank 0's alone."""
    plugin = folder / "saving_plugin"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(
        "import torch\n"
        "from fairseq.trainer import Trainer\n"
        "import ap_fairseq.plugin\n"
        "step = Trainer.train_step\n"
        "def saving_step(self, *args, **kwargs):\n"
        "    result = step(self, *args, **kwargs)\n"
        f"    torch.save(self.model.state_dict(), {str(folder)!r} + f'/rank{{self.data_parallel_rank}}.pt')\n"
        "    return result\n"
        "Trainer.train_step = saving_step\n"
    )
    return plugin


def test_two_ranks_train_and_resume_under_the_same_masks(data_bin, dense, masks_file, tmp_path):
    """Six updates, validation, then a resume without the mask file: all ranks hold the same parameters and masks, those
    of the file."""
    plugin = ["--user-dir", saving_plugin(tmp_path).name]  # relative, as torchrun starts ranks where it was started
    flags = ["--finetune-from-model", dense, "--attention-masks", masks_file]
    log = run_torchrun(*train_command(data_bin, tmp_path / "out", 6, *plugin, *flags), cwd=tmp_path)
    assert "training on 2 devices" in log and "effective sparsity" in log and '"valid_loss"' in log
    plugin = ["--user-dir", tmp_path / plugin[1]]
    log = run_slurm(tmp_path, *train_command(data_bin, tmp_path / "out", 8, *plugin, "--disable-validation"))
    assert "Loaded checkpoint" in log and "@ 6 updates" in log
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    packed = PruningMasks.load(masks_file).packed()
    for layer in range(2):
        site = first[f"encoder.layers.{layer}.self_attn.keep_words"]
        np.testing.assert_array_equal(site, packed["encoder_self.keep"][layer])
    assert torch.equal(load_checkpoint(tmp_path / "out" / "checkpoint_last.pt")["model"][name], first[name])


def test_two_ranks_derive_the_masks_that_one_derives(data_bin, dense, tmp_path):
    """Pruning while training: each rank records its part of the sample, and all get the masks of the whole.

    A learning rate of 0 keeps the parameters of one rank and of two the same to the last bit.
    """
    plugin = ["--user-dir", saving_plugin(tmp_path), "--task", "pruned_translation"]
    flags = ["--finetune-from-model", dense, "--attention-masks", "none", "--attention-sparsity", 0.8, "--lr", 0]
    flags += ["--prune-start", 2, "--prune-end", 3, "--prune-every", 1, "--prune-sample", 301, "--disable-validation"]
    flags += ["--prune-flags", "--criterion importance --granularity cross=scaled-diagonal --max-heads encoder_self=1"]
    log = run_torchrun(*train_command(data_bin, tmp_path / "two", 4, *plugin, *flags))
    assert "training on 2 devices" in log and "301 sentences recorded" in log
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS))
    run(*train_command(data_bin, tmp_path / "one", 4, *plugin, *flags))
    alone = load_checkpoint(tmp_path / "one" / "checkpoint_last.pt")["model"]
    masks = [name for name in first if name.endswith(MASK_BUFFERS)]
    assert sum(first[name].numel() for name in masks if name.endswith("offset_words")) > 0
    for name in masks:
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], alone[name]), name


def test_gloo_ends_before_python(tmp_path):
    """Its threads need the interpreter to let go of tensors; without it they abort a process that has done its work."""
    script = f"""
import atexit, torch
atexit.register(lambda: print("still initialized:", torch.distributed.is_initialized()))  # the first runs last
import ap_fairseq.plugin
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path / "store"}", world_size=1, rank=0)
torch.distributed.all_reduce(torch.ones(1))
"""
    assert run("python", "-c", script).endswith("still initialized: False\n")


def test_a_rank_that_dies_ends_the_recording(data_bin, dense, tmp_path):
    """The other rank ends with an error within seconds, not after gloo's half hour, and nothing is written.

    It waited that long where it made the group of ranks only after its data were loaded.
    """
    ranks = start_ranks(
        *record_command(data_bin, dense, tmp_path / "stats", "--batch-size", 1, "--log-format", "simple")
    )
    for line in ranks[0].stdout:
        if "data_utils" in line or "loaded" in line:
            break
    ranks[1].send_signal(signal.SIGKILL)
    died = time.monotonic()
    ranks[1].communicate()
    log, _ = ranks[0].communicate(timeout=120)
    assert ranks[0].returncode not in (0, None) and time.monotonic() - died < 60
    assert "onnection" in log or "closed" in log, log[-2000:]
    assert not list(tmp_path.iterdir())


def die(rank, cfg, job, errors):
    os._exit(rank)


def write_elsewhere(rank, cfg, job, errors):
    record_on_rank(cfg, dataclasses.replace(job, output="missing/stats"), errors)


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (die, "rank 1 of the recording died .*exit code 1.*was not written"),
        (write_elsewhere, "^cannot write missing/stats: folder missing does"),
    ],
)
def test_errors_of_spawned_ranks_are_one_line(monkeypatch, data_bin, dense, tmp_path, capsys, fails, message):
    """fairseq spawns one process for each GPU; what a process raises, or its death, reaches the user as an error."""

    def spawn(cfg, main, job, errors):
        torch.multiprocessing.spawn(fails, args=(cfg, job, errors), nprocs=RANKS)

    monkeypatch.setattr(record.distributed_utils, "call_main", spawn)
    with pytest.raises(SystemExit) as stop:
        record.main([str(data_bin), "--path", str(dense), "-o", str(tmp_path / "stats"), "--cpu"])
    error = capsys.readouterr().err.strip().splitlines()[-1].partition("error: ")[2]
    assert stop.value.code == 2 and re.search(message, error), error


def test_shards_of_a_translation_are_scored_together(data_bin, dense, tmp_path):
    """The logs of all shards are one system, one alone is an error. fairseq accepts --num-shards and ignores it."""
    shards = [tmp_path / f"shard{k}" for k in range(2)]
    for k, shard in enumerate(shards):
        flags = ["--batch-size", 8, "--distributed-world-size", 2, "--distributed-rank", k]
        shard.write_text(generate(data_bin, dense, *flags, subset="valid"))
    assert len(read_hypotheses(shards)) == 60
    with pytest.raises(ArtifactError, match="or the logs of other ranks are missing, so join all by colons"):
        read_hypotheses(shards[:1])
