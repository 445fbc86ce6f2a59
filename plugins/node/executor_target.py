"""What one callable takes and gives, seen from inside an executor: resolve it, read its arguments, encode its result.

Loaded by file path into the executor, so it imports only the standard library and msgspec. It runs nothing but imports,
and it knows neither sockets nor frames.
"""

import collections.abc
import contextlib
import gc
import importlib
import inspect
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Final, Optional, Union

import msgspec

GPU_OUT_OF_MEMORY: Final = "GpuOutOfMemory"
MESSAGE_CHARS_MAX: Final = 2000
TRACEBACK_CHARS_MAX: Final = 8000
TRACEBACK_FRAMES_MAX: Final = 64
DOC_CHARS_MAX: Final = 500
DEFAULT_BYTES_MAX: Final = 1000  # of a default value shown in a schema; longer ones are left out

BASES_MAX: Final = 32
CAUSES_MAX: Final = 10

_ARGUMENTS: Final = "rocyard_arguments"
_OUT_OF_MEMORY: Final = re.compile(
    r"\b(hip|cuda)\b[^\n]{0,60}\bout of memory|hipErrorOutOfMemory|CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation",
    re.IGNORECASE,
)
_FILE_CHUNK_BYTES: Final = 1024 * 1024


class InvalidArguments(Exception):
    """The arguments do not fit the function."""


class ResultNotSerialisable(Exception):
    """The returned value has no JSON form."""


class ResultTooLarge(Exception):
    """The returned value is over the limit."""


class ResultNotStored(Exception):
    """The returned value could not be written."""


class Target(msgspec.Struct, frozen=True):
    """A callable that is ready to be called.

    Attributes:
        function: the callable.
        arguments: from the JSON object of keyword arguments to converted ones; raises `InvalidArguments`.
    """

    function: Callable[..., Any]
    arguments: Callable[[bytes], dict[str, Any]]


def resolve(target: str) -> tuple[Target, float]:
    """The callable that ``module:name`` names, and the seconds that importing took.

    Raises:
        Exception: whatever its module raises on import; AttributeError, TypeError, NameError where it is not a callable
            that can be called with named arguments.
    """
    function, load_s = _load(target)
    return Target(function, _arguments_of(function)), load_s


def describe(target: str) -> tuple[bytes, str]:
    """JSON Schema of the arguments as one object, and the first paragraph of the documentation.

    Raises:
        Exception: as `resolve`; TypeError names a parameter whose type has no JSON form.
    """
    function, _ = _load(target)
    return _schema_of(function, target.partition(":")[2]), _doc_of(function)


def encode_result(value: Any, inline_bytes_max: int, bytes_max: int, *, filed: bool) -> bytes:
    """JSON of what a function returned. NaN and infinities become ``null``: JSON has neither.

    Args:
        inline_bytes_max: what an answer holds.
        bytes_max: what a file may hold.
        filed: whether there is a place for a file.

    Raises:
        ResultNotSerialisable, ResultTooLarge: each names a remedy.
    """
    try:
        data = _encode(value)
    except Exception as error:  # noqa: BLE001  # user code: hooks of the returned object may raise anything
        raise ResultNotSerialisable(
            f"the function returned a {type(value).__name__} that has no JSON form ({error}): return numbers, text, "
            "booleans, None, lists, dicts, dataclasses or arrays"
        ) from None
    said, remedy = f"the result is {len(data)} bytes of JSON", "write it to a file or an object store and return where it is"
    if len(data) > bytes_max:
        raise ResultTooLarge(f"{said}, the limit is {bytes_max} (tasks.result_bytes_max): {remedy}")
    if len(data) > inline_bytes_max and not filed:
        raise ResultTooLarge(
            f"{said}, the limit is {inline_bytes_max} (results.inline_bytes_max) where there is no place for larger ones "
            f"(results.url is not set): have it set, or {remedy}"
        )
    return data


def write_result(data: bytes, path: str) -> str:
    """Write `data` to `path` so that it survives a power cut, except for the name; its SHA-256.

    Raises:
        ResultNotStored: with the system's reason.
    """
    import hashlib  # loads a library of megabytes, which few executors need

    digest = hashlib.sha256()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb", buffering=0) as file:  # noqa: PTH123  # it has a descriptor, no path
                view = memoryview(data)
                while view:
                    written = file.write(view[:_FILE_CHUNK_BYTES])
                    digest.update(view[:written])
                    view = view[written:]
                os.fsync(fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(path)  # noqa: PTH108  # a user's interpreter starts faster without pathlib
            raise
    except OSError as error:
        raise ResultNotStored(
            f"the result ({len(data)} bytes of JSON) could not be written to {path}: {error.strerror}"
        ) from None
    return digest.hexdigest()


def empty_device_cache() -> None:
    """Give back what torch keeps of a device for later, after a task that found no memory there."""
    gc.collect()  # an exception and the frames that it names are a cycle
    torch: Any = sys.modules.get("torch")
    with contextlib.suppress(AttributeError, RuntimeError):  # something else by that name; a device that has failed
        torch.cuda.empty_cache()


def failure_of(error: BaseException, frames_skipped: int) -> tuple[str, str, str, tuple[str, ...]]:
    """Name, message, traceback and classes of `error`, bounded, without local variables and without our own frames.

    Its name is that of its class, or `GPU_OUT_OF_MEMORY`.
    """
    ours = isinstance(error, InvalidArguments | ResultNotSerialisable | ResultTooLarge | ResultNotStored)
    trace = error.__traceback__
    for _ in range(frames_skipped):
        trace = trace.tb_next if trace is not None else None
    try:
        message = str(error)
        lines = [] if ours else traceback.format_exception(type(error), error, trace, limit=-TRACEBACK_FRAMES_MAX)
    except Exception as broken:  # noqa: BLE001  # the exception is of the user's class: its text may raise anything
        message, lines = f"its text cannot be shown: str() raised {type(broken).__name__}", []
    if isinstance(error, SystemExit):
        message = f"the function called sys.exit({message})"
    name = GPU_OUT_OF_MEMORY if _ran_out_of_device_memory(error) else _clean(type(error).__name__)
    classes = [kind.__name__ for kind in type(error).__mro__ if kind is not object]
    trace_text = _clean("".join(lines))[-TRACEBACK_CHARS_MAX:]
    return name, _clean(message)[:MESSAGE_CHARS_MAX], trace_text, tuple(map(_clean, classes[:BASES_MAX]))


def _ran_out_of_device_memory(error: BaseException) -> bool:
    """Whether `error`, or what caused it, says that a device had no memory left. That of the host is another matter."""
    cause: BaseException | None = error
    for _ in range(CAUSES_MAX):
        if cause is None:
            break
        for kind in type(cause).__mro__:
            if kind.__name__ == "OutOfMemoryError" and str(kind.__module__).partition(".")[0] == "torch":
                return True
        if isinstance(cause, RuntimeError):
            with contextlib.suppress(Exception):  # the text of a user's class may raise anything
                if _OUT_OF_MEMORY.search(str(cause)):
                    return True
        cause = cause.__cause__
    return False


def _load(target: str) -> tuple[Callable[..., Any], float]:
    module_name, _, path = target.partition(":")
    began = time.perf_counter()
    value: Any = importlib.import_module(module_name)
    load_s = time.perf_counter() - began
    for name in path.split("."):
        value = getattr(value, name)
    if not callable(value):
        raise TypeError(f"{target} is a {type(value).__name__}, not something that can be called")
    return value, load_s


def _parameters(function: Callable[..., Any]) -> tuple[list[inspect.Parameter], inspect.Parameter | None]:
    """Parameters that can be given by name, and ``**kwargs`` if there is one. ``*args`` is left empty."""
    named: list[inspect.Parameter] = []
    rest: inspect.Parameter | None = None
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(f"parameter {parameter.name!r} is positional-only: arguments are given by name")
        if parameter.kind is parameter.VAR_KEYWORD:
            rest = parameter
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            named.append(parameter)
    return named, rest


def _annotation(parameter: inspect.Parameter) -> Any:
    """The type of a parameter; ``x: int = None`` means what its author meant by it."""
    if parameter.annotation is parameter.empty:
        return Any
    return Optional[parameter.annotation] if parameter.default is None else parameter.annotation  # noqa: UP045


def _struct(named: list[inspect.Parameter], *, forbid_unknown_fields: bool) -> type[msgspec.Struct]:
    """One struct with a field for each parameter.

    UNSET stands for "not given", so that the function's own default, whatever it is, applies.
    """
    fields: list[Any] = []
    for parameter in named:
        kind = _annotation(parameter)
        if parameter.default is parameter.empty:
            fields.append((parameter.name, kind))
        else:
            fields.append((parameter.name, Union[kind, msgspec.UnsetType], msgspec.UNSET))  # noqa: UP007
    return msgspec.defstruct(_ARGUMENTS, fields, kw_only=True, forbid_unknown_fields=forbid_unknown_fields)


def _arguments_of(function: Callable[..., Any]) -> Callable[[bytes], dict[str, Any]]:
    named, rest = _parameters(function)
    names = frozenset(parameter.name for parameter in named)
    decode = msgspec.json.Decoder(_struct(named, forbid_unknown_fields=rest is None)).decode
    decode_raw = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
    decode_rest = msgspec.json.Decoder(_annotation(rest) if rest is not None else Any).decode
    defaults = any(parameter.default is not parameter.empty for parameter in named)
    asdict, unset = msgspec.structs.asdict, msgspec.UNSET

    def arguments(data: bytes) -> dict[str, Any]:
        try:
            given = asdict(decode(data))
            if defaults:
                given = {name: value for name, value in given.items() if value is not unset}
            if rest is not None:
                given.update((name, decode_rest(raw)) for name, raw in decode_raw(data).items() if name not in names)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise InvalidArguments(str(error)) from None
        return given

    return arguments


def _schema_of(function: Callable[..., Any], name: str) -> bytes:
    named, rest = _parameters(function)
    for parameter in [*named, *([rest] if rest is not None else [])]:
        try:
            msgspec.json.schema_components([_annotation(parameter)])
        except (TypeError, NameError) as error:
            raise TypeError(
                f"parameter {parameter.name!r} cannot come from JSON ({str(error).splitlines()[-1]}): annotate it with "
                "int, float, str, bool, list, dict, a dataclass or a msgspec.Struct, or leave it without annotation"
            ) from None
    kinds = [_struct(named, forbid_unknown_fields=rest is None)]
    if rest is not None:
        kinds.append(_annotation(rest))
    (top_ref, *rest_schema), components = msgspec.json.schema_components(kinds, ref_template="#/$defs/{name}")
    top = components.pop(top_ref["$ref"].rpartition("/")[2])
    top["title"] = name
    for parameter in named:
        _add_default(top["properties"][parameter.name], parameter.default)
    top["additionalProperties"] = (rest_schema[0] or True) if rest_schema else False
    if components:
        top["$defs"] = components
    return msgspec.json.encode({"$schema": "https://json-schema.org/draft/2020-12/schema", **top})


def _add_default(schema: dict[str, Any], default: Any) -> None:
    if default is inspect.Parameter.empty or (isinstance(default, float) and not math.isfinite(default)):
        return
    try:
        if len(data := msgspec.json.encode(default)) <= DEFAULT_BYTES_MAX:
            schema["default"] = msgspec.Raw(data)
    except (TypeError, ValueError, RecursionError):
        return  # a default without a JSON form still applies; it just cannot be shown


def _doc_of(function: Callable[..., Any]) -> str:
    paragraph = (inspect.getdoc(function) or "").strip().partition("\n\n")[0]
    return _clean(" ".join(paragraph.split()))[:DOC_CHARS_MAX]


def _plain(value: Any) -> Any:
    """What msgspec does not know: arrays and scalars of numpy, tensors of torch, subclasses of plain types, paths."""
    if callable(tolist := getattr(value, "tolist", None)):
        return tolist()
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, collections.abc.Mapping):
        return dict(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a {type(value).__name__} has no JSON form")


_encode: Final = msgspec.json.Encoder(enc_hook=_plain).encode


def _clean(text: str) -> str:
    """`text` with lone surrogates escaped: they have no UTF-8 form."""
    return text.encode("utf-8", "backslashreplace").decode()
