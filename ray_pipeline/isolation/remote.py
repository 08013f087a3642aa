"""Objects of another process: calls go over a pair of pipes, as values, one JSON line each.

Runs in both processes of `sandbox.run_judged`, so it needs the standard library alone. Numbers, text, lists and such
are sent as copies; objects of other classes stay where they are and are called from afar (`Remote`). An object's own
opinion of whether it equals, or how it differs from, a plain value is never asked for: it could always say yes. So
`Vector(1, 2) * 3` cannot be tested, `Vector(1, 2) + Vector(3, 4) == Vector(4, 6)` can.
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import IO, Any

# Names that both sides have: their functions and classes are looked up again on the other side, not called from afar.
SHARED = frozenset(
    "array bisect builtins calendar cmath collections copy datetime decimal fractions functools heapq itertools json "
    "math numbers operator random re statistics string textwrap time typing numpy".split()
)
_COMPARED = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
_COMBINED = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow", "and", "or", "xor", "lshift")
_COMBINING = [f"__{side}{name}__" for name in (*_COMBINED, "rshift") for side in ("", "r", "i")]
_ASKED = (len, str, repr, bool, hash, iter, next, reversed, abs, round, int, float)
_BUILTIN = {f"__{function.__name__}__": function for function in _ASKED}
_OTHERS = [f"__{name}__" for name in "call getitem setitem delitem neg pos invert enter exit index".split()]
_SUBCLASSED: dict[type, Any] = {int: int.__int__, float: float.__float__, str: str.__str__}
TESTS = "tests"  # the module that the tests believe to be
_MUTABLE = (list, dict, set, bytearray, deque)
_MADE: dict[str, Callable[[Any], Any]] = {
    "bytes": bytes.fromhex, "bytearray": bytearray.fromhex, "Fraction": Fraction, "Decimal": Decimal,
    "complex": lambda parts: complex(*parts), "range": lambda parts: range(*parts),
    "NotImplemented": lambda _: NotImplemented,
}  # fmt: skip
_SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}


class Remote:
    """An object of the other process. What is done to it is done there."""

    def __init__(self, peer: Peer, number: int):
        self.__dict__.update(_peer=peer, _number=number)

    def __getattr__(self, name: str) -> Any:
        return self._peer.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("set", self, name, value)

    def __iter__(self) -> Iterator[Any]:
        found: Iterator[Any] = self._peer.ask("call", self, "__iter__")
        return found

    def __contains__(self, wanted: Any) -> bool:
        return any(found is wanted or found == wanted for found in self)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Remote) and bool(self._peer.ask("isinstance", self, value))


def _delegated(name: str, *, compared: bool = False) -> Any:
    def method(self: Remote, /, *arguments: Any, **named: Any) -> Any:
        if compared and not (arguments and isinstance(arguments[0], Remote)):
            return NotImplemented
        found = self._peer.ask("call", self, name, *arguments, **named)
        return bool(found) if name in _COMPARED and found is not NotImplemented else found

    return method


for _name in (*_BUILTIN, *_OTHERS):
    setattr(Remote, _name, _delegated(_name))
for _name in (*_COMPARED, *_COMBINING):
    setattr(Remote, _name, _delegated(_name, compared=True))


class Peer:
    """One end of the pipes: asks the other process, and does what it is asked.

    Args:
        serves: the other side may do anything with objects from here (the program). Else it may call what it was handed
            (the tests hand over functions, say), and use the attributes of objects whose class the tests define.
    """

    def __init__(self, reading: int, writing: int, *, serves: bool):
        self._in: IO[str] = os.fdopen(reading, encoding="ascii")
        self._out: IO[str] = os.fdopen(writing, "w", encoding="ascii")
        self._serves = serves
        self._own: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._remotes: dict[int, Remote] = {}
        self.exceptions: dict[str, type[BaseException]] = {}
        sys.set_int_max_str_digits(0)  # the clock bounds them

    def ask(self, verb: str, /, *operands: Any, **named: Any) -> Any:
        """Have the other process do something; raises what it raised."""
        self._send({"ask": verb, "operands": self.encode(list(operands)), "named": self.encode(named)})
        while True:
            message = self._receive()
            if message is None:
                raise EOFError("the program has ended")
            if "ask" in message:
                self._do(message)
                continue
            for operand, changed in zip(operands, message.get("changed", ()), strict=False):
                _assign(operand, None if changed is None else self.decode(changed))
            if "error" in message:
                error = self._exception(message["error"])
                if isinstance(error, StopIteration) and operands[1:2] != ("__next__",):
                    raise RuntimeError("StopIteration out of a call")  # it would end a loop of the tests
                raise error
            if "operand" in message:
                return operands[message["operand"]]
            return self.decode(message["value"])

    def serve(self) -> None:
        """Do what is asked until the other process ends; it asks for the program when it is confined itself."""
        while (message := self._receive()) is not None:
            self._do(message)

    def _send(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def _receive(self) -> dict[str, Any] | None:
        line = self._in.readline()
        message = json.loads(line) if line else None
        assert message is None or isinstance(message, dict)
        return message

    def _do(self, message: dict[str, Any]) -> None:
        try:
            reply = self._reply(message)
        except BaseException as error:  # noqa: BLE001  a program may raise anything; the asking side raises it again
            reply = {"error": self._described(error)}
        self._send(reply)

    def _reply(self, message: dict[str, Any]) -> dict[str, Any]:
        if not self._serves and "yours" not in message["operands"]["list"][0]:
            raise PermissionError("only what the tests handed over can be used")
        operands, named = self.decode(message["operands"]), self.decode(message["named"])
        value = self._perform(message["ask"], operands, named)
        reply: dict[str, Any] = {}
        place = next((i for i, operand in enumerate(operands) if operand is value and _is_mutable(value)), None)
        reply |= {"value": self.encode(value)} if place is None else {"operand": place}
        if any(map(_is_mutable, operands)):
            reply["changed"] = [self.encode(operand) if _is_mutable(operand) else None for operand in operands]
        return reply

    def _perform(self, verb: str, operands: list[Any], named: dict[str, Any]) -> Any:
        target, *rest = operands
        if verb == "call":
            name, *arguments = rest
            if name == "__call__":
                return target(*arguments, **named)
            if name in _BUILTIN:
                return _BUILTIN[name](target, *arguments)
            if name not in _OTHERS and name not in _COMPARED and name not in _COMBINING:
                raise PermissionError(f"{name} is not called from afar")
            method = getattr(type(target), name, None)
            return NotImplemented if method is None else method(target, *arguments, **named)
        if verb in ("get", "set"):
            if not self._serves and (type(target).__module__ != TESTS or rest[0].startswith("_")):
                raise PermissionError("only attributes of the tests' own objects can be used")
            return getattr(target, *rest) if verb == "get" else setattr(target, *rest)
        assert self._serves
        if verb == "isinstance":
            return isinstance(rest[0], target)
        assert verb == "load"
        return self._load(target)

    def _load(self, source: str) -> list[list[Any]]:
        """Execute the program; its names with their values."""
        space: dict[str, Any] = {"__name__": "solution"}
        exec(compile(source, "<solution>", "exec", dont_inherit=True), space)
        return [[name, value] for name, value in space.items() if not name.startswith("__")]

    def encode(self, value: Any) -> Any:
        """A value as JSON: plain data as a copy, anything else by its number here."""
        if value is None or type(value) in (bool, int, float, str):
            return value
        for kind, plain in _SUBCLASSED.items():
            if isinstance(value, kind):
                return plain(value)
        if value is NotImplemented:
            return {"NotImplemented": 0}
        if isinstance(value, Remote):
            return {"yours": value.__dict__["_number"]}
        if isinstance(value, dict):
            return {"dict": [[self.encode(key), self.encode(inner)] for key, inner in value.items()]}
        for name, sequence in _SEQUENCES.items():
            if isinstance(value, sequence):
                return {name: [self.encode(inner) for inner in value]}
        if isinstance(value, bytes | bytearray):
            return {"bytearray" if isinstance(value, bytearray) else "bytes": value.hex()}
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        if isinstance(value, Fraction | Decimal):
            return {"Fraction" if isinstance(value, Fraction) else "Decimal": str(value)}
        if isinstance(value, range):
            return {"range": [value.start, value.stop, value.step]}
        if type(value).__module__ == "numpy" and hasattr(value, "dtype"):
            return {"numpy": [self.encode(value.tolist()), str(value.dtype)]}
        shared = _shared_name(value)
        return {"shared": shared} if shared else self._numbered(value)

    def _numbered(self, value: Any) -> dict[str, Any]:
        number = self._numbers.setdefault(id(value), len(self._own))
        if number == len(self._own):
            self._own.append(value)  # kept forever, so its id stays its own
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"raised": [kind.__name__ for kind in value.__mro__]}
        return {"mine": number}

    def decode(self, data: Any) -> Any:
        """What `encode` of the other side meant. Makes nothing but plain data, numbers of objects, and shared names."""
        if not isinstance(data, dict):
            assert not isinstance(data, list)
            return data
        ((kind, inner),) = data.items()
        if kind in _SEQUENCES:
            return _SEQUENCES[kind](self.decode(item) for item in inner)
        if kind == "dict":
            return {self.decode(key): self.decode(value) for key, value in inner}
        if kind == "yours":
            return self._own[inner]
        if kind == "mine":
            return self._remotes.setdefault(inner, Remote(self, inner))
        if kind == "raised":
            return self._exception_class(inner)
        if kind == "shared":
            return _shared(*inner)
        if kind == "numpy":
            return importlib.import_module("numpy").asarray(self.decode(inner[0]), dtype=inner[1])
        return _MADE[kind](inner)

    def _described(self, error: BaseException) -> dict[str, Any]:
        given = [value for value in error.args if value is None or isinstance(value, bool | int | float | str)]
        return {"names": [kind.__name__ for kind in type(error).__mro__], "args": self.encode(given)}

    def _exception_class(self, names: list[str]) -> type[BaseException]:
        """A class of that name: known already, built in, or made from the first built-in one it descends from."""
        name = str(names[0])
        known = self.exceptions.get(name) or _builtin_exception(name)
        if known is None:
            base = next(filter(None, map(_builtin_exception, map(str, names))), Exception)
            known = self.exceptions.setdefault(name, type(name, (base,), {}))
        return known

    def _exception(self, described: dict[str, Any]) -> BaseException:
        arguments = self.decode(described["args"])
        try:
            return self._exception_class(described["names"])(*arguments)
        except TypeError:  # UnicodeError and its kin take what does not come along
            return RuntimeError(*arguments)


def _builtin_exception(name: str) -> type[BaseException] | None:
    found = getattr(builtins, name, None)
    return found if isinstance(found, type) and issubclass(found, BaseException) else None


def _is_mutable(value: Any) -> bool:
    return isinstance(value, _MUTABLE)


def _assign(operand: Any, changed: Any) -> None:
    """Make a list (dict, set, ...) equal to what the call has made of it."""
    if changed is None or operand == changed:
        return
    operand.clear()
    (operand.update if isinstance(operand, dict | set) else operand.extend)(changed)


def _shared_name(value: Any) -> list[str] | None:
    """Module and name of something that the other side has too."""
    if isinstance(value, types.ModuleType):
        return [value.__name__, ""] if value.__name__ in SHARED else None
    if not isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return None
    module, name = getattr(value, "__module__", None), value.__name__
    if module not in SHARED:  # C modules call themselves _bisect or itertools
        module = next((m for m in SHARED if getattr(sys.modules.get(m), name, None) is value), None)
    return [module, name] if module and getattr(sys.modules.get(module), name, None) is value else None


def _shared(module: str, name: str) -> Any:
    """Only modules, functions and classes of `SHARED`: no object that calls itself equal to everything."""
    assert module in SHARED and not name.startswith("_")
    found = importlib.import_module(module)
    value = getattr(found, name) if name else found
    assert not name or isinstance(value, type | types.FunctionType | types.BuiltinFunctionType)
    return value
