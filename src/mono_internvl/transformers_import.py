"""Something to do as soon as transformers is imported, without importing it."""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_HOST = "transformers"


def when_complete(module: str, function: str, user: str) -> None:
    """Call `module.function()` now if transformers is loaded, else right after it has been.

    Right after `import transformers` none of its parts is half imported, so that the function may
    import any of them. Where it is a module of this package that imports transformers, that one
    cannot be used yet; the function is then called right after `user` has run.

    Args:
        module: Name of a module of this package, imported only then.
        function: Name of a function in it, without arguments.
        user: Name of a module of this package that imports transformers, and nothing of which the
            function needs more.
    """
    if _HOST in sys.modules:
        getattr(import_module(module), function)()
    else:
        sys.meta_path.insert(0, _Finder(module, function, user))


def _is_half_imported(name: str) -> bool:
    if name.partition(".")[0] != __package__ or name == __package__:
        return False
    return bool(getattr(getattr(sys.modules[name], "__spec__", None), "_initializing", False))


class _Finder(MetaPathFinder):
    """Finds the awaited modules as everybody does, and has the function called when one has run."""

    def __init__(self, module: str, function: str, user: str) -> None:
        self._module, self._function, self._awaited = module, function, (_HOST, user)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self._awaited:
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
            if self not in sys.meta_path:  # others may have asked where the module is, too
                return
            if module.__name__ == _HOST and any(map(_is_half_imported, list(sys.modules))):
                return
            sys.meta_path.remove(self)
            getattr(import_module(self._module), self._function)()

        loader.exec_module = exec_module
