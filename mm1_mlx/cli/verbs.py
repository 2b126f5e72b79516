"""A door and a public verb with one name: the door's module can be called."""

import sys
from importlib import import_module
from types import ModuleType

TYPE_CHECKING = False  # not from typing, which costs more than this whole module
if TYPE_CHECKING:
    from inspect import Signature


class _Verb(ModuleType):
    """A module that calls its verb.

    `import mm1_mlx.generate` sets `mm1_mlx.generate` to the module; users who wrote
    `mm1_mlx.generate(model, ...)` or `from mm1_mlx import generate` must not notice.
    """

    _verb_home: str

    def __call__(self, *args, **settings):
        return self._verb()(*args, **settings)

    def _verb(self):
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(self._verb_home), name)

    @property
    def __signature__(self) -> "Signature":
        from inspect import signature

        return signature(self._verb())


def make_callable(module: str, home: str) -> None:
    """Let the door `module` be called as the function of its name in module `home`.

    Nothing happens when the door runs as a command: then it is `__main__`.
    """
    if module == "__main__":
        return
    door = sys.modules[module]
    door.__class__ = _Verb
    door.__dict__["_verb_home"] = home
