"""Tells transformers' Auto classes of the sliced architecture, without importing transformers for it.

`import slicegpt` promises that `AutoModelForCausalLM.from_pretrained(folder)` loads what `slicegpt slice` wrote,
whichever of the two packages is imported first. To register a class means to import it, and with it torch and
transformers, which takes seconds. Hence:

- Auto classes that are in memory are told at once. For the others, a finder at the head of `sys.meta_path` watches for
  the two modules that define them. It finds nothing itself: it asks the other finders, and wraps the loader that they
  name, so that the classes are told before anybody else can get hold of the module.
- The config's class is imported then; it needs no more than `AutoConfig` did. Of the model classes stand-ins are
  registered, which import the class when it is used. At the moment that `AutoModel` is defined, the class could not be
  imported: `transformers.modeling_layers`, for one, imports `AutoModel` in its first lines, before it defines what our
  network derives from. When the network is imported, its classes take the place of their stand-ins.
"""

from __future__ import annotations

import copyreg
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_CONFIGURATION_AUTO = "transformers.models.auto.configuration_auto"
_MODELING_AUTO = "transformers.models.auto.modeling_auto"
_NETWORK = "slicegpt.modeling.network"
_HEADS = "slicegpt.modeling.heads"

# Of each Auto class of models, the class that it makes of a `SlicedConfig`, and the module that defines it.
_MODELS = {
    "AutoModel": (_NETWORK, "SlicedModel"),
    "AutoModelForCausalLM": (_NETWORK, "SlicedForCausalLM"),
    "AutoModelForQuestionAnswering": (_HEADS, "SlicedForQuestionAnswering"),
    "AutoModelForSequenceClassification": (_HEADS, "SlicedForSequenceClassification"),
    "AutoModelForTokenClassification": (_HEADS, "SlicedForTokenClassification"),
}
_WATCHED = {_CONFIGURATION_AUTO, _MODELING_AUTO, *(module for module, _ in _MODELS.values())}


def watch() -> None:
    """Register with the Auto classes that are in memory, and with the others as soon as they are.

    May be called any number of times.
    """
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _register()


def _register() -> None:
    """Tell the Auto classes that are in memory: of the config, and of the models or their stand-ins."""
    # A module that is still being executed, here or in another thread, is there before its classes are.
    auto = sys.modules.get(_CONFIGURATION_AUTO)
    if not hasattr(auto, "AutoConfig"):
        return
    try:
        config = import_module("slicegpt.modeling.configuration").SlicedConfig
    except Exception as error:
        # Whoever imports transformers did not ask for us, and must not fail for our sake.
        logging.getLogger(__name__).warning("transformers' Auto classes cannot load sliced models: %s", error)
        return
    auto.AutoConfig.register(config.model_type, config, exist_ok=True)
    auto = sys.modules.get(_MODELING_AUTO)
    for name, (module, model) in _MODELS.items():
        if hasattr(auto, name):
            found = getattr(sys.modules.get(module), model, None) or _stand_in(module, model, config)
            getattr(auto, name).register(config, found, exist_ok=True)


class _StandIn(type):
    """The class of stand-ins: a class whose attributes are those of another one, which is imported for the first."""

    def __getattr__(cls, name: str) -> Any:
        return getattr(_load(cls.__module__, cls.__name__), name)

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        return _load(cls.__module__, cls.__name__)(*arguments, **options)


def _stand_in(module: str, name: str, config: type) -> _StandIn:
    # `register` looks at the config's class; what a class has itself is not looked up elsewhere.
    return _StandIn(name, (), {"__module__": module, "__qualname__": name, "config_class": config})


def _load(module: str, name: str) -> type:
    return getattr(import_module(module), name)


# A pickled stand-in is the class itself where it is unpickled.
copyreg.pickle(_StandIn, lambda model: (_load, (model.__module__, model.__name__)))


class _Finder:
    """The finder that watches."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _WATCHED:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _WatchedLoader(spec.loader)
                return spec
        return None


class _WatchedLoader:
    """Another loader, whose module is followed by `_register`; the module itself sees the other loader alone."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:
        """Whatever else a loader can do, such as `get_source`."""
        return getattr(self.__dict__["_loader"], name)


_finder = _Finder()
