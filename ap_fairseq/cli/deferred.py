"""fairseq without the seconds of importing scikit-learn and SciPy.

Two of its modules of classification import their metrics, which only training a classifier calls. While these modules
are imported, and no others, stand-ins are in the places of the metrics.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader

CLASSIFICATION = ("fairseq.criterions.sentence_prediction", "fairseq.tasks.audio_classification")
METRICS = ("sklearn", "sklearn.metrics", "scipy.stats")


class _StandIn(types.ModuleType):
    """A module of functions, each of which imports the true module when it is called."""

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: getattr(importlib.import_module(self.__name__), name)(*args, **kwargs)


class _Loader(SourceFileLoader):
    """Runs a module with stand-ins for those metrics that are installed and have not been imported yet."""

    def exec_module(self, module: types.ModuleType) -> None:
        stand_ins = {
            name: _StandIn(name)
            for name in METRICS
            if name not in sys.modules and importlib.util.find_spec(name.partition(".")[0])
        }
        if "sklearn" in stand_ins:
            stand_ins["sklearn"].metrics = stand_ins["sklearn.metrics"]  # type: ignore[attr-defined]
        sys.modules.update(stand_ins)
        try:
            super().exec_module(module)
        finally:
            for name in stand_ins:
                del sys.modules[name]


class _Finder:
    """Finds fairseq's modules of classification."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in CLASSIFICATION else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


def defer_metrics() -> None:
    """Let fairseq, if it is imported from now on, import scikit-learn and SciPy where it first calls their metrics."""
    sys.meta_path.insert(0, _Finder)
