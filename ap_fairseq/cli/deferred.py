"""fairseq without the seconds of importing scikit-learn and SciPy, whose metrics two of its modules of classification
import and only training a classifier calls."""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable

CLASSIFICATION = ("fairseq.criterions.sentence_prediction", "fairseq.tasks.audio_classification")
METRICS = ("sklearn", "sklearn.metrics", "scipy.stats")


class _StandIn(types.ModuleType):
    """A module of functions, each of which imports the true module when it is called."""

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            return getattr(importlib.import_module(self.__name__), name)(*args, **kwargs)

        return call


class _Finder:
    """Finds fairseq's modules of classification; they, and no others, get stand-ins for the modules of metrics."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name not in CLASSIFICATION:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            loader, load = spec.loader, spec.loader.exec_module
            loader.exec_module = lambda module: _load(load, module)  # type: ignore[method-assign]
        return spec


def _load(load: Callable, module: types.ModuleType) -> None:
    names = [name for name in METRICS if importlib.util.find_spec(name.partition(".")[0])]  # what is installed
    stand_ins = {name: _StandIn(name) for name in names if name not in sys.modules}
    if "sklearn" in stand_ins:
        stand_ins["sklearn"].metrics = stand_ins["sklearn.metrics"]  # type: ignore[attr-defined]
    sys.modules |= stand_ins
    try:
        load(module)
    finally:
        for name in stand_ins:
            del sys.modules[name]


def defer_metrics() -> None:
    """Let fairseq, if it is imported from now on, import scikit-learn and SciPy where it first calls their metrics."""
    sys.meta_path.insert(0, _Finder)
