"""Something to do as soon as transformers is imported, without importing it."""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_HOST = "transformers"


def when_complete(module: str, function: str) -> None:
    """Call `module.function()` now if transformers is loaded, else right after it has been.

    Right after `import transformers` none of its parts is half imported, so that the function may
    import any of them.

    Args:
        module: Name of a module of this package, imported only then.
        function: Name of a function in it, without arguments.
    """
    if _HOST in sys.modules:
        _call(module, function)
    else:
        sys.meta_path.insert(0, _Finder(module, function))


def _call(module: str, function: str) -> None:
    # A module of this package that is being imported at this moment cannot be used yet. Those that
    # need transformers end in the public names, which call the function themselves.
    if not any(_is_half_imported(name) for name in list(sys.modules)):
        getattr(import_module(module), function)()


def _is_half_imported(name: str) -> bool:
    if name.partition(".")[0] != __package__ or name == __package__:
        return False
    return bool(getattr(getattr(sys.modules[name], "__spec__", None), "_initializing", False))


class _Finder(MetaPathFinder):
    """Finds transformers as everybody does, and has the function called when it has run."""

    def __init__(self, module: str, function: str) -> None:
        self._module, self._function = module, function

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != _HOST:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:  # others may have asked where transformers is, too
                sys.meta_path.remove(self)
                _call(self._module, self._function)

        loader.exec_module = exec_module
