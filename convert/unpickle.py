"""Pickles of weights without running them: a small machine for the few operations that
torch.save writes.

Python's own unpickler can be told which names it may load, but not what it may do with
them: a pickle of nine bytes makes it reserve gigabytes, and a deep tuple as a key ends
the process. Here nothing is called but what the reader allows, keys are plain, memory
grows with the file alone, and every other operation is refused by its name.
"""

import pickletools
from collections.abc import Callable
from typing import Any

_LONGEST = 16  # bytes of a whole number; a size has 8 at most
_KEYS = (str, int, float, bool, type(None))

_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,  # only passed over
}
_LITERALS = (
    *("BININT", "BININT1", "BININT2", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING"),
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class UnpickleError(Exception):
    """What in a pickle is not as weights are; nothing of it was run."""


class RefusedError(UnpickleError):
    """A name that weights do not need."""


def unpickle(
    data: bytes,
    find: Callable[[str, str], Any],
    persistent: Callable[[Any], Any],
) -> Any:
    """The object of a pickle.

    find: (module, name) -> what stands for it, RefusedError for others; it is called
    with arguments where the pickle says so, if it can be. persistent: what a
    persistent id stands for. Raises UnpickleError, and what these two raise.
    """
    return _Machine(find, persistent).run(data)


def unpickle_plain(data: bytes) -> Any:
    """The object of a pickle of lists, dictionaries, texts and numbers alone, of any
    protocol, that of Python 2 as well. RefusedError for one that names anything."""
    return _PlainMachine(_refuse, _refuse).run(data)


def _refuse(*name: Any) -> Any:
    raise RefusedError(".".join(str(part)[:40] for part in name))


class _Machine:
    def __init__(self, find: Callable[[str, str], Any], persistent: Callable):
        self._find, self._persistent = find, persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        try:
            for operation, argument, _ in pickletools.genops(data):
                if operation.name == "STOP":
                    return self._pop()
                self._do(operation.name, argument)
        except (ValueError, IndexError, KeyError) as error:
            raise UnpickleError(f"it is damaged: {str(error)[:80]}") from None
        raise UnpickleError("it ends too early")

    def _pop(self) -> Any:
        if not self._stack or (self._marks and self._marks[-1] >= len(self._stack)):
            raise UnpickleError("it takes a value that is not there")
        return self._stack.pop()

    def _pop_mark(self) -> list[Any]:
        """What has come since the last mark."""
        if not self._marks:
            raise UnpickleError("it ends a group that has not begun")
        height = self._marks.pop()
        items = self._stack[height:]
        del self._stack[height:]
        return items

    def _do(self, name: str, argument: Any) -> None:
        push = self._stack.append
        if name in _LITERALS:
            push(argument)
        elif name in _CONSTANTS:
            push(_CONSTANTS[name]())
        elif name in ("LONG1", "LONG4"):
            if argument.bit_length() > 8 * _LONGEST:
                raise UnpickleError("it has a number that is too long")
            push(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._top()
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif name in ("BINGET", "LONG_BINGET"):
            push(self._memo[argument])
        elif name not in ("PROTO", "FRAME"):
            self._build(name, argument)

    def _top(self) -> Any:
        value = self._pop()
        self._stack.append(value)
        return value

    def _build(self, name: str, argument: Any) -> None:
        push = self._stack.append
        if name == "MARK":
            self._marks.append(len(self._stack))
        elif name == "POP":
            self._pop()
        elif name == "POP_MARK":
            self._pop_mark()
        elif name in _TUPLES:
            items = [self._pop() for _ in range(_TUPLES[name])]
            push(tuple(reversed(items)))
        elif name == "TUPLE":
            push(tuple(self._pop_mark()))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [self._pop()] if name == "APPEND" else self._pop_mark()
            self._expect(self._top(), list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop_mark() if name == "SETITEMS" else self._pair()
            self._set(items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            push(self._global(name, argument))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = self._expect(self._pop(), tuple)
            push(self._call(self._pop(), arguments))
        elif name == "BUILD":  # attributes, such as a state dictionary's _metadata
            self._pop()
            self._top()
        elif name == "BINPERSID":
            push(self._persistent(self._pop()))
        else:
            raise UnpickleError(
                f"it has the operation {name}, which weights do not need"
            )

    def _pair(self) -> list[Any]:
        value = self._pop()
        return [self._pop(), value]

    def _set(self, items: list[Any]) -> None:
        target = self._expect(self._top(), dict)
        if len(items) % 2:
            raise UnpickleError("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, _KEYS):  # to hash any other may never end
                raise UnpickleError(f"it has a {type(key).__name__} as a key")
            target[key] = value

    def _expect(self, value: Any, kind: type) -> Any:
        if not isinstance(value, kind):
            raise UnpickleError(
                f"it has a {type(value).__name__} where a {kind.__name__} belongs"
            )
        return value

    def _global(self, name: str, argument: Any) -> Any:
        if name == "GLOBAL":  # "module name"
            module, _, item = argument.partition(" ")
        else:
            module, item = reversed([self._pop(), self._pop()])
        if not isinstance(module, str) or not isinstance(item, str):
            raise UnpickleError("it has a name that is no text")
        return self._find(module, item)

    def _call(self, function: Any, arguments: tuple) -> Any:
        if not callable(function):
            raise UnpickleError("it calls what cannot be called")
        try:
            return function(*arguments)
        except TypeError as error:
            raise UnpickleError(f"it calls with other arguments: {error}") from None


class _PlainMachine(_Machine):
    """Also knows how Python 2 wrote plain data, and the texts of newer protocols."""

    def _do(self, name: str, argument: Any) -> None:
        push = self._stack.append
        if name in ("INT", "LONG", "FLOAT", "STRING", "UNICODE"):
            push(argument)
        elif name == "PUT":
            self._memo[argument] = self._top()
        elif name == "GET":
            push(self._memo[argument])
        elif name == "LIST":
            push(self._pop_mark())
        elif name == "DICT":
            items = self._pop_mark()
            push({})
            self._set(items)
        elif name in ("INST", "OBJ", "NEWOBJ_EX", "PERSID", "EXT1", "EXT2", "EXT4"):
            _refuse(name, argument)
        else:
            super()._do(name, argument)
