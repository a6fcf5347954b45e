"""The console commands: one module each."""

from ap_fairseq.cli.deferred import defer_metrics

defer_metrics()  # here, as the modules of the commands begin by importing fairseq
