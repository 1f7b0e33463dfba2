"""Runs the pickle program of a PyTorch file on an interpreter that can build data and nothing else.

Python's own unpickler is not used, even with `find_class` restricted: BUILD sets attributes on whatever lies
on the stack, and one LONG_BINPUT of five bytes makes its memo table allocate gigabytes. Here a global is only
ever a name, a call is one of four known ones, and memory stays proportional to the length of the file.
"""

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

# Storage types of `torch` and the numpy (or ml_dtypes) type of one number in them.
STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
CALLABLE = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_parameter",
}
SCRIPTED = "__torch__."  # before the name of a TorchScript module's class
ADMITTED = CALLABLE | {f"torch.{name}" for name in STORAGES}

# What a damaged program raises while it is decoded or run; AssertionError comes from pickletools.
DAMAGED = (ValueError, TypeError, LookupError, OverflowError, EOFError, AssertionError, AttributeError)


class Refused(Exception):
    """The program asks for something other than data; the text says for what."""


class Global(NamedTuple):
    """A name that the program may mention, as `module.name`; never the object behind it."""

    name: str


class Storage(NamedTuple):
    """`numel` numbers stored under `key`, seen from element `start` on."""

    key: str
    dtype: str
    numel: int
    start: int = 0
    view_numel: int | None = None


class Tensor(NamedTuple):
    """A strided view of a storage; offset and strides are in elements, as in PyTorch."""

    storage: Storage
    offset: int
    shape: tuple
    stride: tuple


class Module:
    """What TorchScript has saved of a module, its attributes by name; the class that it names is not looked for."""

    def __init__(self):
        self.attributes: dict = {}


_MARK = object()
# Instructions whose argument is the value itself.
_LITERALS = (
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}


def run(stream: BinaryIO) -> Any:
    """Runs one pickle from `stream` and leaves the stream behind its end.

    Returns plain data in which tensors are `Tensor`. Raises `Refused`, or one of `DAMAGED` for a broken one.
    """
    stack: list = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "STOP":
            return stack.pop()
        elif name in _STEPS:
            _STEPS[name](stack, memo, argument)
        else:
            if name == "INST":
                _global(argument)  # for a message that names the global
            raise Refused(f"the instruction {name}")
    raise EOFError("no STOP")


def _global(spaced: str) -> Global:
    # pickletools hands over "module name"; the module itself never holds a space.
    name = spaced.replace(" ", ".", 1).replace("__builtin__.", "builtins.")
    if name not in ADMITTED and not name.startswith(SCRIPTED):
        raise Refused(f"`{name[:100]!s}`")
    return Global(name)


def _stack_global(stack: list) -> Global:
    name, module = stack.pop(), stack.pop()
    if not (isinstance(name, str) and isinstance(module, str)):
        raise Refused("a global that is not named by two strings")
    return _global(f"{module} {name}")


def _above_mark(stack: list) -> list:
    for index in range(len(stack) - 1, -1, -1):
        if stack[index] is _MARK:
            items = stack[index + 1 :]
            del stack[index:]
            return items
    raise IndexError("no mark")


def _fill(target: dict, flat: list) -> dict:
    if type(target) is not dict:
        raise Refused("setting items of something that is no dict")
    if len(flat) % 2:
        raise ValueError("a key without a value")
    for key, value in zip(flat[::2], flat[1::2]):
        # Hashing a tuple recurses without limit in C, and takes exponential time if built of shared halves.
        if not isinstance(key, str | bytes | int | float | None):
            raise Refused("a dict key that is no string or number")
        target[key] = value
    return target


def _extend(target: list, items: list) -> None:
    if type(target) is not list:
        raise Refused("appending to something that is no list")
    target.extend(items)


def _tuple(count: int) -> Callable:
    def step(stack: list, memo: dict, argument: Any) -> None:
        if len(stack) < count:
            raise IndexError("stack underrun")
        stack[-count:] = [tuple(stack[-count:])]

    return step


def _push(make: Callable) -> Callable:
    return lambda stack, memo, argument: stack.append(make(stack, memo, argument))


def _remember(stack: list, memo: dict, argument: Any) -> None:
    memo[len(memo) if argument is None else argument] = stack[-1]


def _append(stack: list, memo: dict, argument: Any) -> None:
    item = stack.pop()
    _extend(stack[-1], [item])


def _appends(stack: list, memo: dict, argument: Any) -> None:
    items = _above_mark(stack)
    _extend(stack[-1], items)


def _set_item(stack: list, memo: dict, argument: Any) -> None:
    value, key = stack.pop(), stack.pop()
    _fill(stack[-1], [key, value])


def _set_items(stack: list, memo: dict, argument: Any) -> None:
    flat = _above_mark(stack)
    _fill(stack[-1], flat)


def _new(stack: list, memo: dict, argument: Any) -> None:
    arguments, kind = stack.pop(), stack.pop()
    if not isinstance(kind, Global) or not kind.name.startswith(SCRIPTED) or arguments != ():
        raise Refused(f"a new object of {_describe(kind)}")
    stack.append(Module())


def _build(stack: list, memo: dict, argument: Any) -> None:
    # The only state that a state dict carries is OrderedDict's `_metadata`; it is dropped, not set.
    state = stack.pop()
    if type(stack[-1]) is Module and type(state) is dict:
        stack[-1].attributes = state
    elif type(stack[-1]) is not dict:
        raise Refused(f"setting the state of {_describe(stack[-1])}")


def _reduce(stack: list, memo: dict, argument: Any) -> None:
    arguments, function = stack.pop(), stack.pop()
    if not isinstance(function, Global) or function.name not in CALLABLE:
        raise Refused(f"a call of {_describe(function)}")
    if not isinstance(arguments, tuple):
        raise TypeError("arguments that are no tuple")
    stack.append(_call(function.name, arguments))


def _call(name: str, arguments: tuple) -> Any:
    if name == "collections.OrderedDict":
        if not arguments:
            return {}
        (pairs,) = arguments  # the form of Python 2
        if type(pairs) is not list:
            raise Refused("an OrderedDict of something that is no list")
        flat = [part for pair in pairs for part in _pair(pair)]
        # Used up: otherwise one remembered list could be multiplied to any size by a short program.
        pairs.clear()
        return _fill({}, flat)
    if name == "torch._utils._rebuild_parameter":
        if not isinstance(arguments[0], Tensor):
            raise Refused("a parameter made of something that is no tensor")
        return arguments[0]
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, Storage):
        raise Refused("a tensor made of something that is no storage")
    return Tensor(storage, _count(offset), _counts(shape), _counts(stride))


def _persistent(stack: list, memo: dict, argument: Any) -> Storage:
    """A storage: ("storage", type, key, device, numel), in the old format also (view key, start, numel)."""
    record = stack.pop()
    if not (isinstance(record, tuple) and len(record) in (5, 6) and record[0] == "storage"):
        raise Refused(f"a persistent id that is {_describe(record)}, not a storage")
    _, kind, key, _, numel, *view = record
    if not isinstance(kind, Global) or kind.name in CALLABLE:
        raise Refused(f"a storage of {_describe(kind)}")
    if not isinstance(key, str):
        raise TypeError("a storage key that is no string")
    start, view_numel = 0, None
    if view and view[0] is not None:
        _, start, view_numel = view[0]
        start, view_numel = _count(start), _count(view_numel)
    return Storage(key, STORAGES[kind.name.removeprefix("torch.")], _count(numel), start, view_numel)


def _pair(value: Any) -> list | tuple:
    if type(value) not in (list, tuple) or len(value) != 2:
        raise ValueError("a dict item that is no pair")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError("a size out of range")
    return value


def _counts(values: Any) -> tuple:
    # numpy ends at 64 dimensions; no weights come near.
    if type(values) is not tuple or len(values) > 32:
        raise ValueError("a shape that is no short tuple")
    return tuple(_count(value) for value in values)


def _describe(value: Any) -> str:
    return f"`{value.name}`" if isinstance(value, Global) else f"a {type(value).__name__}"


_STEPS: dict[str, Callable] = {
    "PROTO": lambda stack, memo, argument: None,
    "FRAME": lambda stack, memo, argument: None,
    "EMPTY_LIST": _push(lambda stack, memo, argument: []),
    "EMPTY_DICT": _push(lambda stack, memo, argument: {}),
    "TUPLE": _push(lambda stack, memo, argument: tuple(_above_mark(stack))),
    "LIST": _push(lambda stack, memo, argument: _above_mark(stack)),
    "DICT": _push(lambda stack, memo, argument: _fill({}, _above_mark(stack))),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "POP": lambda stack, memo, argument: stack.pop(),
    "POP_MARK": lambda stack, memo, argument: _above_mark(stack),
    "PUT": _remember,
    "BINPUT": _remember,
    "LONG_BINPUT": _remember,
    "MEMOIZE": _remember,
    "GET": _push(lambda stack, memo, argument: memo[argument]),
    "BINGET": _push(lambda stack, memo, argument: memo[argument]),
    "LONG_BINGET": _push(lambda stack, memo, argument: memo[argument]),
    "GLOBAL": _push(lambda stack, memo, argument: _global(argument)),
    "STACK_GLOBAL": _push(lambda stack, memo, argument: _stack_global(stack)),
    "BINPERSID": _push(_persistent),
    "REDUCE": _reduce,
    "NEWOBJ": _new,
    "BUILD": _build,
}
