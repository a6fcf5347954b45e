"""Worker processes make the calls that a search asks for, in order; what they raise is raised there."""

import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from fairseq import options, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks import register_task
from plugin.commands import run, wait_for

from ap_fairseq.cli.common import exit_on_sigterm
from ap_fairseq.files import UserError
from ap_fairseq.generation import binarised, loading
from ap_fairseq.generation import text as generation_text
from ap_fairseq.generation.lines import BatchLines, TranslatedBatch
from ap_fairseq.generation.ranks import Ranks
from ap_fairseq.generation.translator import Translator
from ap_fairseq.generation.workers import MAX_PENDING, Workers, spare_processes
from ap_fairseq.search.hypotheses import Hypotheses
from ap_fairseq.search.running import FOLLOWING, look_ahead
from ap_fairseq.tasks import PrunedTranslationConfig, PrunedTranslationTask


def test_submitted_calls_are_made_in_order_while_this_process_goes_on(tmp_path):
    held, go = ["made before"], tmp_path / "go"

    def note(number):
        wait_for(go.exists)
        held.append((number, os.getpid()))

    with Workers(1, note=note, held=lambda: held) as workers:
        for number in range(MAX_PENDING):
            workers.submit("note", number)
        go.touch()
        for number in range(MAX_PENDING, 9):
            workers.submit("note", number)
        first, *noted = workers.call("held")
    assert held == [first] == ["made before"]
    assert [number for number, _ in noted] == [*range(9)]
    (pid,) = {pid for _, pid in noted}
    assert pid != os.getpid() and not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("cores", "searches", "most", "spare"), [(16, 1, 4, 4), (16, 2, 4, 3), (4, 1, 4, 1), (2, 4, 4, 1)]
)
def test_processes_beside_a_search_are_as_many_as_cores_allow(cores, searches, most, spare, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert spare_processes(searches, most, cpu=False) == spare
    assert spare_processes(searches, most, cpu=True) == 1


def test_results_are_prefetched_and_come_in_order(tmp_path):
    """What a call raises is raised after the results of those before it."""

    def double(number):
        (tmp_path / str(number)).touch()
        if number == 7:
            raise UserError(f"line {number}")
        return 2 * number

    seen = []
    with pytest.raises(UserError, match="^line 7$"), Workers(2, double=double) as workers:
        for number, result in workers.prefetch("double", range(9)):
            wait_for((tmp_path / str(min(number + MAX_PENDING, 8))).exists)
            seen.append((number, result))
    assert seen == [(number, 2 * number) for number in range(7)]


def copy_long(size):
    return int(torch.ones(size, dtype=torch.int32).long().sum())


def _with_threads():
    torch.set_num_threads(2)
    copy_long(1 << 20)
    with Workers(1, copy_long=copy_long) as workers:
        assert workers.call("copy_long", 1 << 20) == 1 << 20


def test_workers_wait_for_no_threads_that_were_not_copied():
    """OpenMP's do not outlive a fork: a line of 33,000 tokens would have been read for ever."""
    searching = multiprocessing.get_context("spawn").Process(target=_with_threads)  # pytest's may have threads already
    searching.start()
    searching.join(60)
    ended = searching.exitcode
    searching.kill()
    assert ended == 0


@pytest.fixture
def handles_sigterm():
    before = signal.getsignal(signal.SIGTERM)
    exit_on_sigterm()
    yield
    signal.signal(signal.SIGTERM, before)


def fail():
    raise UserError("no space is left")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def be_ended():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("work", "message"),
    [(fail, "no space is left"), (die, "died; if memory ran out"), (be_ended, "died; if memory ran out")],
)
def test_a_submitted_call_that_fails_ends_the_work(work, message, handles_sigterm):
    for ask in (lambda workers: workers.call("nothing"), lambda workers: None):
        with pytest.raises(UserError, match=message), Workers(1, work=work, nothing=int) as workers:
            workers.submit("work")
            ask(workers)
    with pytest.raises(UserError, match=message), Workers(1, work=work) as workers:
        for _ in range(MAX_PENDING + 1):
            workers.submit("work")
        raise AssertionError("a search went on")
    with pytest.raises(UserError, match=message), Workers(1, work=lambda number: work()) as workers:
        list(workers.prefetch("work", range(9)))


def test_an_error_of_the_search_is_the_one_that_is_raised():
    with pytest.raises(KeyError), Workers(1, fail=fail) as workers:
        workers.submit("fail")
        raise KeyError
    assert not multiprocessing.active_children()


def _search(pids: Path):
    def note():
        pids.write_text(f"{os.getpid()}\n")
        signal.pause()

    with Workers(1, note=note) as workers:
        workers.submit("note")
        workers.finish()


def test_workers_end_with_the_process_that_searches(tmp_path):
    """It may be killed; they would run, or wait for calls, for ever."""
    pids = tmp_path / "pid"
    searching = multiprocessing.get_context("fork").Process(target=_search, args=(pids,))
    searching.start()
    pid = wait_for(lambda: pids.exists() and pids.read_text().endswith("\n") and int(pids.read_text()))
    searching.kill()
    searching.join()
    wait_for(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes())


def _fail_to_start_the_second():
    exit_on_sigterm()
    fork, started = os.fork, []

    def fork_once() -> int:
        if started:
            raise BlockingIOError("Resource temporarily unavailable")
        started.append(True)
        return fork()

    os.fork = fork_once
    with Workers(2, nothing=int) as workers:
        workers.call("nothing")


def test_a_worker_that_cannot_be_started_ends_the_work():
    """Where memory or file descriptors did not suffice for the second, Python waited for the first for ever.

    The first is asked to end before it runs, when Python forgets a signal that it handles.
    """
    searching = multiprocessing.get_context("fork").Process(target=_fail_to_start_the_second)
    searching.start()
    searching.join(60)
    ended = searching.exitcode
    searching.kill()
    assert ended == 1


by_forks = pytest.mark.skipif(torch.cuda.is_available(), reason="ranks fork from a process that has used CUDA")


def parse(data_bin, model, *more):
    flags = [data_bin, "--task", "pruned_translation", "--path", model, "--max-len-b", 9, "--cpu", *more]
    return options.parse_args_and_arch(options.get_generation_parser(), list(map(str, flags)))


def translate(data_bin, model, folder, *more) -> str:
    """Return the lines about the subset, which makes four batches."""
    folder.mkdir()
    flags = ["--gen-subset", "valid", "--batch-size", 16, "--required-batch-size-multiple", 1, "--num-workers", 0]
    args = parse(data_bin, model, *flags, *more)
    with Ranks([folder / "rank0.log"], cpu=True) as ranks:
        joined = binarised.translate_subset(convert_namespace_to_omegaconf(args), ranks, folder)
    return b"".join(joined.pieces(quiet=False)).decode()


@by_forks
@pytest.mark.parametrize("batch_size", [16, 60], ids=["four batches", "one batch"])
def test_writers_of_one_search_share_its_lines_and_score(batch_size, data_bin, dense, tmp_path, monkeypatch):
    """As on a GPU; of one batch the others have nothing to write."""
    expected = translate(data_bin, dense, tmp_path / "expected", "--batch-size", batch_size)
    monkeypatch.setattr(binarised, "count_writers", lambda *_: 3)
    assert translate(data_bin, dense, tmp_path / "found", "--batch-size", batch_size) == expected
    written = sorted(path.name for path in (tmp_path / "found" / "rank0").glob("lines*.txt"))
    assert written == [f"lines{k}.txt" for k in range(3 if batch_size == 16 else 1)]


@by_forks
def test_a_search_does_not_wait_for_its_lines(data_bin, dense, tmp_path, monkeypatch, caplog):
    """They were printed between searches: here the first are written when all four batches have been searched."""
    expected = translate(data_bin, dense, tmp_path / "expected")
    write, collect, searched = BatchLines.write, TranslatedBatch.collect, []

    def counted(*arguments):
        searched.append(1)
        (tmp_path / f"searched{len(searched)}").touch()
        return collect(*arguments)

    def late(self, batch):
        wait_for((tmp_path / "searched4").exists)
        write(self, batch)

    monkeypatch.setattr(TranslatedBatch, "collect", counted)
    monkeypatch.setattr(BatchLines, "write", late)
    with caplog.at_level("INFO"):
        assert translate(data_bin, dense, tmp_path / "late") == expected
    assert re.search(r"translated 60 sentences \([1-9][\d,]* tokens\); processes: 1, the slowest searched", caplog.text)
    assert len(expected.splitlines()) == 5 * 60 + 1


@by_forks
def test_lines_that_cannot_be_written_end_the_run(data_bin, dense, tmp_path, monkeypatch):
    def full(self, batch):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(BatchLines, "write", full)
    with pytest.raises(UserError, match=r"(?s)process 0 failed with status 1.*\[Errno 28\] No space left on device"):
        translate(data_bin, dense, tmp_path / "lines")


@by_forks
@pytest.mark.parametrize("nbest", [1, 2])
def test_a_command_reads_out_what_it_prints(data_bin, dense, tmp_path, monkeypatch, nbest):
    """fairseq's generators return all hypotheses, each as tensors; that took half as long as the search."""
    seen, collect = tmp_path / "seen", TranslatedBatch.collect

    def noting(sample, found):
        with seen.open("a") as stream:
            stream.write(f"{ {*found.counts.tolist()} }\n")
        return collect(sample, found)

    monkeypatch.setattr(TranslatedBatch, "collect", noting)
    monkeypatch.setattr(Hypotheses, "lists", None)
    run("ap-apply", dense, "--attention-masks", "none", "-o", tmp_path / "ones.pt")
    lines = translate(data_bin, tmp_path / "ones.pt", tmp_path / "lines", "--beam", 3, "--nbest", nbest)
    assert seen.read_text() == f"{ {nbest} }\n" * 4 and len(lines.splitlines()) == (2 + 3 * nbest) * 60 + 1


def translate_lines(data_bin, model, folder, path: Path, *more, part_lines=2) -> list[str]:
    """Return the parts of a text, in batches of one."""
    folder.mkdir()
    args = parse(data_bin, model, "--batch-size", 1, *more)
    text = generation_text.Text.scan(path, path.name, part_lines)
    with Ranks([folder / "rank0.log"], cpu=True) as ranks:
        cfg = convert_namespace_to_omegaconf(args)
        ranks.load(Translator, cfg)
        parts = generation_text.translate_text(args, cfg, text, ranks, folder)
    return [part.read_text() for part in parts]


@by_forks
def test_a_text_is_searched_across_its_parts(data_bin, dense, toy_text, tmp_path, monkeypatch):
    """A search does not wait where a part ends: the batch after each is announced, and all lines stay in their part."""
    one, two, three, four, *_ = (toy_text / "test.en").read_text().splitlines()
    path, seen, search = tmp_path / "in", tmp_path / "seen", Translator.search
    path.write_text("\n".join([one, "", "", "", two, three, four]) + "\n")
    # Workers use no GPU, where a loader would pin the memory of batches.
    monkeypatch.setattr(torch.utils.data, "DataLoader", None)
    expected = translate_lines(data_bin, dense, tmp_path / "expected", path)
    assert [part.count("\n") for part in expected] == [2, 2, 2, 1] and expected[1] == "\n\n" != expected[0]

    def noting(self, sample):
        with seen.open("a") as stream:
            stream.write(f"{sample['net_input']['src_tokens'].numel() > 1} {FOLLOWING in sample}\n")
        return search(self, sample)

    monkeypatch.setattr(Translator, "look_ahead", lambda self, samples: look_ahead(samples, on_gpu=False))
    monkeypatch.setattr(Translator, "search", noting)
    assert translate_lines(data_bin, dense, tmp_path / "found", path) == expected
    assert seen.read_text() == "True True\n" * 3 + "True False\n"
    for folder in ("expected", "found"):  # parts without text are read, and written, before others are searched
        log = (tmp_path / folder / "rank0.log").read_text()
        assert re.findall(r"progress: (\d) / 4 parts", log) == ["1", "3", "4"]
    path.write_text(f"{one}\n\n\n")
    assert translate_lines(data_bin, dense, tmp_path / "empty", path)[1] == "\n"
    assert re.findall(r"progress: (\d) / 2 parts", (tmp_path / "empty" / "rank0.log").read_text()) == ["1", "2"]


@by_forks
def test_workers_share_the_first_part(data_bin, dense, toy_text, tmp_path, monkeypatch):
    """One read all of it, while the others had nothing to do and the search waited."""
    path, seen = tmp_path / "in", tmp_path / "seen"
    one, two, *others = (toy_text / "test.en").read_text().splitlines()[:12]
    path.write_text("\n".join([one, "", two, *others]) + "\n")
    encode, batches = Translator.encode, Translator.batches

    def side_by_side(work: str, part: int, note: str) -> None:
        (seen / f"{work} {note}").touch()
        wait_for(lambda: part > 0 or len(list(seen.glob(f"{work} *"))) > 1)

    def encode_noting(self, lines, name, first):
        side_by_side("encode", first // 10, f"{first}-{first + len(lines) - 1}")
        return encode(self, lines, name, first)

    def batches_noting(self, part, encoded, share, shares):
        side_by_side("batches", part, f"{part}: {share + 1} of {shares}")
        return batches(self, part, encoded, share, shares)

    with monkeypatch.context() as whole:
        whole.setattr(generation_text, "FIRST_SHARES", 1)
        expected = translate_lines(data_bin, dense, tmp_path / "expected", path, part_lines=10)
    seen.mkdir()
    monkeypatch.setattr(Translator, "encode", encode_noting)
    monkeypatch.setattr(Translator, "batches", batches_noting)
    assert translate_lines(data_bin, dense, tmp_path / "found", path, part_lines=10) == expected
    shares = [f"batches 0: {number} of 5" for number in range(1, 6)]
    pieces = [f"encode {lines}" for lines in ("1-2", "11-13", "3-4", "5-6", "7-8", "9-10")]
    assert sorted(file.name for file in seen.iterdir()) == [*shares, "batches 1: 1 of 1", *pieces]


@by_forks
def test_a_part_is_sampled_as_fairseqs_hub_samples(data_bin, dense, toy_text, tmp_path):
    """With the seed of the part. fairseq's loader draws a number before, without which a seed gave another text."""
    path = tmp_path / "in"
    path.write_text("".join((toy_text / "test.en").read_text().splitlines(keepends=True)[:6]))
    flags = ["--sampling", "--beam", 1, "--seed", 5]
    found = translate_lines(data_bin, dense, tmp_path / "found", path, *flags)
    hub = Translator(convert_namespace_to_omegaconf(parse(data_bin, dense, "--batch-size", 1, *flags))).hub
    expected, lines = [], path.read_text().splitlines()
    for part in range(3):
        utils.set_torch_seed(5 + part)
        expected.append("".join(f"{line}\n" for line in hub.sample(lines[2 * part : 2 * part + 2])))
    assert found == expected


@register_task("pruned_translation_worst_first", dataclass=PrunedTranslationConfig)
class WorstFirst(PrunedTranslationTask):
    """A user's task, which works on what a search returns as on fairseq's lists."""

    def inference_step(self, *args, **options):
        found = super().inference_step(*args, **options)
        for hypotheses in found:
            hypotheses.reverse()
        return found[:1] + found[1:]


@by_forks
def test_what_a_task_of_a_user_makes_of_hypotheses_is_printed(data_bin, dense, toy_text, tmp_path):
    """ap-generate printed what the search had found, and of that no more was there than it prints."""
    run("ap-apply", dense, "--attention-masks", "none", "-o", tmp_path / "ones.pt")
    path, own = tmp_path / "in", ["--task", "pruned_translation_worst_first", "--beam", 2]
    path.write_text((toy_text / "valid.en").read_text())
    both = translate(data_bin, tmp_path / "ones.pt", tmp_path / "both", "--beam", 2, "--nbest", 2)
    second = re.findall(r"^H-.*\n(?:[DP]-.*\n)+?(H-.*)", both, re.MULTILINE)
    worst = translate(data_bin, tmp_path / "ones.pt", tmp_path / "worst", *own)
    assert re.findall(r"^H-.*", worst, re.MULTILINE) == second and len(second) == 60
    lines = "".join(translate_lines(data_bin, tmp_path / "ones.pt", tmp_path / "lines", path, *own)).splitlines()
    assert lines == [line.split("\t")[2] for line in second]


def _fork_while_cuda_starts(statuses):
    from triton.runtime import cache

    started = []
    cache.triton_key = lambda: (time.sleep(0.3), started.append("hash"))
    loading._first_kernels = lambda kernels, _: (started.append(kernels.get(timeout=60)), time.sleep(0.3))
    loading.start_cuda()
    if not (child := os.fork()):
        os._exit(len(started))
    statuses.put(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def test_a_fork_waits_until_cuda_has_started():
    """A copy of the process has the locks of the threads, and no thread that gives them back."""
    fork = multiprocessing.get_context("fork")
    statuses = fork.SimpleQueue()
    process = fork.Process(target=_fork_while_cuda_starts, args=(statuses,))
    process.start()
    process.join(60)
    assert process.exitcode == 0 and statuses.get() == 2
