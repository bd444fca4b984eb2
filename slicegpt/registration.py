"""Tells transformers' Auto classes of the sliced architecture, without importing transformers for it.

`import slicegpt` promises that `AutoModelForCausalLM.from_pretrained(folder)` loads what `slicegpt slice` wrote,
whichever of the two packages is imported first. To register a class means to import it, and with it torch and
transformers, which takes seconds. Hence:

- An Auto class that is in memory already is told at once.
- For the others, a finder at the head of `sys.meta_path` watches what is imported from transformers, and tells them
  once they are in memory. It finds nothing itself: it asks the other finders, and wraps the loader that they name for
  as long as the module executes.

Registering is put off to the end of the *outermost* import that is watched. `transformers.modeling_layers`, for one,
imports `AutoModel` in its first lines, before it defines what our network derives from: to import our network there
would fail on a module that is half executed. For the same reason our own `slicegpt.modeling` is watched: it imports
the Auto classes on its way.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_WATCHED = re.compile(r"(transformers|slicegpt\.modeling)(\.|$)")
_CONFIGURATION_AUTO = "transformers.models.auto.configuration_auto"
_MODELING_AUTO = "transformers.models.auto.modeling_auto"

# Of each Auto class of models, which of our classes it makes, and the module in slicegpt.modeling that defines it.
_MODELS = {
    "AutoModel": ("network", "SlicedModel"),
    "AutoModelForCausalLM": ("network", "SlicedForCausalLM"),
}

_log = logging.getLogger(__name__)


def watch() -> None:
    """Register with the Auto classes that are in memory, and with the others as soon as they are.

    May be called any number of times.
    """
    if _finder not in sys.meta_path:
        # It stays there for good and turns idle: to take it out while another thread walks through the list would make
        # that thread skip the finder after it.
        sys.meta_path.insert(0, _finder)
    _finder.register()


class _Finder:
    """The finder that watches; one for the process.

    Attributes:
        missing: of "config" and "models", what transformers has not been told yet.
    """

    def __init__(self) -> None:
        self.missing = {"config", "models"}
        self._thread = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not self.missing or not _WATCHED.match(name):
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _WatchedLoader(spec.loader, self)
                return spec
        return None

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Around an import that is watched; at the end of the outermost one of a thread, what is missing is made up."""
        self._thread.depth = self._depth + 1
        try:
            yield
        finally:
            self._thread.depth -= 1
        self.register()

    def register(self) -> None:
        """Tell the Auto classes that are in memory, unless an import that is watched is under way in this thread."""
        if not self.missing or self._depth:
            return
        self._thread.depth = 1  # our own modules are watched, and must not lead back here
        try:
            # A module that another thread is still executing is there already, its classes are not.
            auto = sys.modules.get(_CONFIGURATION_AUTO)
            if "config" in self.missing and hasattr(auto, "AutoConfig"):
                config = import_module("slicegpt.modeling.configuration").SlicedConfig
                auto.AutoConfig.register(config.model_type, config, exist_ok=True)
                self.missing.discard("config")
            auto = sys.modules.get(_MODELING_AUTO)
            if "models" in self.missing and all(hasattr(auto, name) for name in _MODELS):
                config = import_module("slicegpt.modeling.configuration").SlicedConfig
                for name, (module, model) in _MODELS.items():
                    model = getattr(import_module(f"slicegpt.modeling.{module}"), model)
                    getattr(auto, name).register(config, model, exist_ok=True)
                self.missing.discard("models")
        except Exception as error:
            # Whoever imports transformers did not ask for us: it must go on. The next import from it tries again.
            _log.warning("transformers' Auto classes cannot load sliced models: %s", error)
        finally:
            self._thread.depth = 0

    @property
    def _depth(self) -> int:
        return getattr(self._thread, "depth", 0)


class _WatchedLoader:
    """Another loader, whose module is executed under `_Finder.importing`; the module sees the other loader alone."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        with self._finder.importing():
            self._loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        """Whatever else a loader can do, such as `get_code` for `python -m`."""
        return getattr(self.__dict__["_loader"], name)


_finder = _Finder()
