"""Names of a package that are imported from their modules at first use (PEP 562)."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_exports(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for the package `package`.

    Importing torch and transformers takes seconds, and most of what a package offers needs them: a command line that
    prints its help, or an error about a number, must not wait for them. So a package's `__init__.py` says

        __getattr__, __dir__ = lazy_exports(__name__, {"SlicedConfig": "slicegpt.modeling.configuration"})

    and repeats these imports under `if TYPE_CHECKING:` for editors and type checkers.

    Args:
        modules: of each name the module that defines it. A name whose module is the package's own of that name is
            that submodule.
    """

    def __getattr__(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(modules[name])
        value = module if modules[name] == f"{package}.{name}" else getattr(module, name)
        setattr(sys.modules[package], name, value)  # the next use finds it without coming here
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return __getattr__, __dir__
