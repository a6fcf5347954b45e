"""The console commands: one module each."""

import atexit
import gc
import multiprocessing
import os
import signal
import sys

from ap_fairseq.cli.deferred import defer_metrics

defer_metrics()  # here, as the modules of the commands begin by importing fairseq

by_module = sys.argv[0] == "-m" and any(word.startswith(f"{__name__}.") for word in sys.orig_argv)
by_command = os.path.basename(sys.argv[0]).startswith("ap-")
own_program = (by_command or by_module) and multiprocessing.parent_process() is None
# A process that a command spawns imports its program, too, before it knows its parent, and calls no command.
spawned = "--multiprocessing-fork" in sys.orig_argv
succeeded = False  # of the command, says `common.command`


def _leave() -> None:
    """End a command that has succeeded: Python would first free all that was imported, which takes a tenth of a second.

    What raises here, as a full disk of standard output, is left to Python's own end.
    """
    if succeeded and multiprocessing.parent_process() is None:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(0)


if own_program and not spawned:
    atexit.register(_leave)  # the first that is registered is called last, after those of what is imported from here on
    gc.disable()  # nothing that is imported is garbage, and an eighth of the time went into looking
if own_program and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # While they are imported, which takes seconds, Ctrl-C ends the command: without a traceback of whatever is imported
    # now, some of which even tries again. `common.command` takes both from there.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
