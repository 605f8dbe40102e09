"""The pickle inside a torch file, read as data: which tensor lies where in which storage.

Knows the few pickle operations `torch.save(state_dict)` writes (protocols 2 to 5) and the four
names such a file needs. It imports nothing, calls nothing and builds no object of a class the
file names: each operation is interpreted here, and anything beyond the tables below is refused
by name. It knows neither zip archives nor files; `torch_file` does.

The shape of the pickle is that of torch's own serialization (torch/serialization.py,
torch/_utils.py: `_rebuild_tensor_v2`, `_rebuild_parameter`).
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from typing import Any

from fastvlm_mlx.errors import CheckpointError

# A billion-parameter state_dict needs about 250 bytes and 40 operations a tensor, so these leave
# room for some 20,000 tensors and keep a hostile pickle's time and memory small.
MAX_PICKLE_BYTES = 8 << 20
_MAX_OPERATIONS = 1_000_000
_MAX_DIMENSIONS = 16

_STORAGE_DTYPES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
_ORDERED_DICT = "collections.OrderedDict"
_REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
_ALLOWED = frozenset({_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER, *_STORAGE_DTYPES})

# Operations whose argument is the value pushed, and those that push a fixed immutable value.
_LITERALS = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"})
_FIXED: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLE_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class RefusedPickle(CheckpointError):
    """The pickle holds something a state_dict of plain tensors does not need. Nothing was run."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A flat run of `size` items of `dtype`, kept in the archive under `key`."""

    dtype: str
    key: str
    size: int


@dataclass(frozen=True, slots=True)
class TensorView:
    """A tensor as offset, shape and strides (all in items) into its storage, bounds checked."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Items from the first to the last one touched, inclusive; 0 for an empty tensor."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))


@dataclass(frozen=True, slots=True)
class _Name:
    """An allowed global, as its name only."""

    text: str


def shown(text: str) -> str:
    """A name from the file, safe to print: one line, ASCII, at most 80 characters."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")[1:-1]


def read_state_dict(data: bytes) -> dict[str, TensorView]:
    """The tensors a pickled state_dict names, in file order.

    Raises RefusedPickle, without a file name, for anything but a dict of name to plain tensor.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise RefusedPickle(f"its pickle is {len(data)} bytes, more than any state_dict needs")
    machine = _Machine()
    position = 0
    try:
        for count, (opcode, arg, place) in enumerate(pickletools.genops(data)):
            if count >= _MAX_OPERATIONS:
                raise RefusedPickle("its pickle has more operations than any state_dict needs")
            machine.step(opcode.name, arg)
            position = place or 0
    except ValueError as error:  # pickletools' report of a malformed pickle
        raise RefusedPickle(f"its pickle is corrupt ({shown(str(error))})") from None
    if position + 1 != len(data):
        raise RefusedPickle("its pickle is followed by other data")
    return _tensors(machine.result)


def _tensors(state: object) -> dict[str, TensorView]:
    if not isinstance(state, dict):
        raise RefusedPickle(f"it holds {_kind(state)}, not a state_dict")
    for name, value in state.items():
        if not isinstance(value, TensorView):
            raise RefusedPickle(
                f"its entry '{shown(name)}' is {_kind(value)}, not a tensor; "
                "save the plain state_dict, a dict of name to tensor"
            )
    return dict(state)


def _kind(value: object) -> str:
    """What a value is, never its repr: a hostile nested tuple has an endless one."""
    kinds = {str: "text", int: "a number", bool: "a number", tuple: "a tuple"}
    kinds |= {dict: "a dict", OrderedDict: "a dict", TensorView: "a tensor"}
    return kinds.get(type(value), "something else")


class _Machine:
    """A pickle stack that can hold only None, bool, int, str, tuples, dicts and the types above."""

    def __init__(self) -> None:
        self.result: object = None
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each open MARK
        self._memo: dict[int, Any] = {}

    def step(self, operation: str, arg: Any) -> None:
        """Interpret one operation, `arg` as pickletools decodes it."""
        match operation:
            case _ if operation in _LITERALS:
                self._stack.append(arg)
            case _ if operation in _FIXED:
                self._stack.append(_FIXED[operation])
            case "EMPTY_DICT":
                self._stack.append({})
            case "MARK":
                self._below.append(self._stack)
                self._stack = []
            case "TUPLE":
                items = self._pop_to_mark()  # first: it brings back the stack under the mark
                self._stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self._pop() for _ in range(_TUPLE_SIZES[operation])]
                self._stack.append(tuple(reversed(items)))
            case "SETITEM":
                value, key = self._pop(), self._pop()
                self._set_items([key, value])
            case "SETITEMS":
                self._set_items(self._pop_to_mark())
            case "BINPUT" | "LONG_BINPUT":
                self._memo[arg] = self._top()
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._top()
            case "BINGET" | "LONG_BINGET":
                if arg not in self._memo:
                    raise RefusedPickle("its pickle is corrupt (a memo entry that was never made)")
                self._stack.append(self._memo[arg])
            case "PROTO" | "FRAME":  # the operations tell; frames are only a hint to readers
                pass
            case "STOP":
                self.result = self._pop()
                if self._stack or self._below:
                    raise RefusedPickle("its pickle is corrupt (values left on the stack)")
            case _:
                self._object_step(operation, arg)

    def _object_step(self, operation: str, arg: Any) -> None:
        """The operations that make objects in a real pickle; here each makes plain data."""
        match operation:
            case "GLOBAL":  # pickletools joins module and name with a space
                self._stack.append(_allowed_name(str(arg).replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = self._pop(), self._pop()
                if type(name) is not str or type(module) is not str:
                    raise RefusedPickle("its pickle looks up a name that is not text")
                self._stack.append(_allowed_name(f"{module}.{name}"))
            case "BINPERSID":
                self._stack.append(_storage(self._pop()))
            case "REDUCE":
                args, function = self._pop(), self._pop()
                self._stack.append(_rebuild(function, args))
            case "BUILD":  # a module's state_dict carries `_metadata`; nothing here reads it
                state = self._pop()
                if type(self._top()) is not OrderedDict or type(state) is not dict:
                    raise RefusedPickle("its pickle sets the state of an object (BUILD)")
            case _:
                detail = f" {shown(arg)}" if isinstance(arg, str) else ""
                raise RefusedPickle(
                    f"its pickle uses {operation}{detail}, which a state_dict of plain tensors "
                    "never needs; nothing was run"
                )

    def _top(self) -> Any:
        if not self._stack:
            raise RefusedPickle("its pickle is corrupt (the stack is empty)")
        return self._stack[-1]

    def _pop(self) -> Any:
        value = self._top()
        self._stack.pop()
        return value

    def _pop_to_mark(self) -> list[Any]:
        if not self._below:
            raise RefusedPickle("its pickle is corrupt (no mark on the stack)")
        items, self._stack = self._stack, self._below.pop()
        return items

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            raise RefusedPickle("its pickle is corrupt (items for something that is not a dict)")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:  # also keeps endless tuple hashes out
                raise RefusedPickle(f"its pickle has a dict key that is {_kind(key)}, not text")
            target[key] = value


def _allowed_name(name: str) -> _Name:
    if name not in _ALLOWED:
        raise RefusedPickle(
            f"its pickle wants {shown(name)}, which a state_dict of plain tensors never needs; "
            "nothing was run"
        )
    return _Name(name)


def _storage(reference: object) -> Storage:
    """("storage", storage type, key, device, items) as torch's persistent ids have it."""
    match reference:
        case ("storage", _Name(text=name), str(key), str(), int(size)) if (
            name in _STORAGE_DTYPES and size >= 0 and type(size) is int
        ):
            return Storage(_STORAGE_DTYPES[name], key, size)
    raise RefusedPickle("its pickle refers to something that is not a tensor's storage")


def _rebuild(function: object, args: object) -> object:
    match function, args:
        case _Name(text="collections.OrderedDict"), ():
            return OrderedDict()
        case _Name(text="torch._utils._rebuild_parameter"), (TensorView() as tensor, bool(), hooks):
            _no_hooks(hooks)
            return tensor
        case (
            _Name(text="torch._utils._rebuild_tensor_v2"),
            (Storage() as storage, int(offset), tuple(shape), tuple(stride), bool(), hooks),
        ):
            _no_hooks(hooks)
            return _view(storage, offset, shape, stride)
    name = function.text if isinstance(function, _Name) else _kind(function)
    raise RefusedPickle(f"its pickle calls {shown(name)} with arguments torch never writes")


def _no_hooks(hooks: object) -> None:
    if type(hooks) is not OrderedDict or hooks:
        raise RefusedPickle("its pickle has a tensor with backward hooks")


def _view(
    storage: Storage, offset: int, shape: tuple[object, ...], stride: tuple[object, ...]
) -> TensorView:
    if len(shape) != len(stride) or len(shape) > _MAX_DIMENSIONS:
        raise RefusedPickle("its pickle has a tensor whose shape and strides do not fit")
    (start,) = _whole_numbers((offset,))
    sizes, steps = _whole_numbers(shape), _whole_numbers(stride)
    view = TensorView(storage, start, sizes, steps)
    # An expanded tensor (stride 0) would read as more items than the file holds, and an empty one
    # may still have sides no array can have.
    most = max(storage.size, 1 << 32) if 0 in sizes else storage.size
    if start + view.span > storage.size or prod(size or 1 for size in sizes) > most:
        raise RefusedPickle("its pickle has a tensor that reaches outside its storage")
    return view


def _whole_numbers(values: tuple[object, ...]) -> tuple[int, ...]:
    numbers = tuple(value for value in values if type(value) is int and 0 <= value < 1 << 48)
    if len(numbers) != len(values):
        raise RefusedPickle("its pickle has a tensor with an impossible shape, stride or offset")
    return numbers
