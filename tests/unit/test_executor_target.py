"""What an executor makes of a callable: schema, arguments, result, failure."""

import collections
import dataclasses
import enum
import math
import pathlib
from typing import Annotated, Any, Literal

import jsonschema_rs
import msgspec
import numpy as np
import pytest

from plugins.node import executor_target


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.5


class Opaque:
    pass


NOT_JSON = object()


def plain(a: int, b: str = "x", *, c: list[int] = [1, 2]) -> None:  # noqa: B006
    """Does something
    with arguments.

    And more.
    """


def loose(a, b=NOT_JSON, c=math.inf): ...


def rich(
    point: Point,
    kind: Literal["p", "q"] = "p",
    colour: Colour = Colour.RED,
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0,
    name: str = None,  # noqa: RUF013
): ...


def anything(**values: Any): ...


def counted(first: int, **counts: int): ...


def starred(*rest: int, a: int = 1): ...


def array(values: np.ndarray): ...


def positional(a, /): ...


def unresolvable(a: "NoSuchType"): ...  # noqa: F821


class Model:
    def __call__(self, a: int): ...

    @staticmethod
    def method(a: int): ...


model = Model()


def target(function) -> str:
    return f"{__name__}:{function}"


def schema_of(function) -> dict[str, Any]:
    return msgspec.json.decode(executor_target.describe(target(function))[0])


def arguments_of(function, data: str) -> dict[str, Any]:
    return executor_target.resolve(target(function))[0].arguments(data.encode())


class TestSchema:
    def test_of_a_plain_function(self):
        assert schema_of("plain") == {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "plain",
            "type": "object",
            "properties": {
                "a": {"type": "integer"},
                "b": {"type": "string", "default": "x"},
                "c": {"type": "array", "items": {"type": "integer"}, "default": [1, 2]},
            },
            "required": ["a"],
            "additionalProperties": False,
        }

    def test_unannotated_parameters_take_anything_and_odd_defaults_are_not_shown(self):
        schema = schema_of("loose")
        assert schema["properties"] == {"a": {}, "b": {}, "c": {}}
        assert schema["required"] == ["a"]

    def test_of_structured_types(self):
        schema = schema_of("rich")
        assert schema["properties"]["point"] == {"$ref": "#/$defs/Point"}
        assert schema["properties"]["kind"] == {"enum": ["p", "q"], "default": "p"}
        assert schema["properties"]["share"] == {"type": "number", "minimum": 0, "maximum": 1, "default": 1.0}
        assert schema["$defs"]["Point"]["required"] == ["x"]
        assert {"type": "null"} in schema["properties"]["name"]["anyOf"]

    @pytest.mark.parametrize("function", ["plain", "loose", "rich", "anything", "counted", "model", "Model.method"])
    def test_it_is_a_valid_schema(self, function):
        jsonschema_rs.validator_for(schema_of(function))

    @pytest.mark.parametrize(
        ("function", "given", "fits"),
        [
            ("plain", {"a": 1}, True),
            ("plain", {}, False),
            ("plain", {"a": 1, "d": 2}, False),
            ("plain", {"a": "1"}, False),
            ("rich", {"point": {"x": 1}, "kind": "q", "name": None}, True),
            ("rich", {"point": {"x": 1}, "share": 2}, False),
            ("anything", {"x": [1, {"y": None}]}, True),
            ("counted", {"first": 1, "a": 2}, True),
            ("counted", {"first": 1, "a": "two"}, False),
            ("starred", {"a": 2}, True),
        ],
    )
    def test_schema_and_executor_agree(self, function, given, fits):
        assert jsonschema_rs.validator_for(schema_of(function)).is_valid(given) is fits
        if fits:
            arguments_of(function, msgspec.json.encode(given).decode())
        else:
            with pytest.raises(executor_target.InvalidArguments):
                arguments_of(function, msgspec.json.encode(given).decode())

    def test_the_doc_is_the_first_paragraph_in_one_line(self):
        assert executor_target.describe(target("plain"))[1] == "Does something with arguments."

    @pytest.mark.parametrize(
        ("function", "error", "says"),
        [
            ("array", TypeError, "parameter 'values' cannot come from JSON .*ndarray.*annotate it with"),
            ("positional", TypeError, "'a' is positional-only"),
            ("unresolvable", NameError, "NoSuchType"),
            ("NOT_JSON", TypeError, "is a object, not something that can be called"),
            ("no_such", AttributeError, "no_such"),
        ],
    )
    def test_what_cannot_be_called_with_json_is_named(self, function, error, says):
        with pytest.raises(error, match=says):
            executor_target.describe(target(function))


class TestArguments:
    def test_are_converted_to_the_annotated_types(self):
        assert arguments_of("rich", '{"point": {"x": 1}, "colour": "red"}') == {
            "point": Point(1, 0.5),
            "colour": Colour.RED,
        }

    def test_what_is_not_given_is_left_to_the_functions_default(self):
        assert arguments_of("loose", '{"a": null}') == {"a": None}

    def test_null_is_a_value(self):
        assert arguments_of("rich", '{"point": {"x": 1}, "name": null}')["name"] is None

    def test_others_go_to_kwargs(self):
        assert arguments_of("counted", '{"first": 1, "b": 2, "c": 3}') == {"first": 1, "b": 2, "c": 3}

    @pytest.mark.parametrize("data", ["", "[]", "null", "{", '{"a": 1} x', '{"a": NaN}', '{"a": 1e999}', "[" * 5000])
    def test_what_is_no_such_object_is_refused(self, data):
        with pytest.raises(executor_target.InvalidArguments):
            arguments_of("plain", data)

    def test_the_message_says_where(self):
        with pytest.raises(executor_target.InvalidArguments, match=r"Expected `int`, got `str` - at `\$.point.x`"):
            arguments_of("rich", '{"point": {"x": "no"}}')


class TestResult:
    @pytest.mark.parametrize(
        ("value", "json"),
        [
            (None, b"null"),
            ({"a": [1, 2.5, "é", True]}, '{"a":[1,2.5,"é",true]}'.encode()),
            (math.nan, b"null"),
            ({"x": [math.inf, -math.inf]}, b'{"x":[null,null]}'),
            (np.array([[1.0, math.nan]]), b"[[1.0,null]]"),
            (np.float32(0.5), b"0.5"),
            (np.float64(0.5), b"0.5"),
            (np.int64(3), b"3"),
            ({"n": np.bool_(True)}, b'{"n":true}'),
            (Point(1), b'{"x":1,"y":0.5}'),
            (Colour.RED, b'"red"'),
            (pathlib.PurePosixPath("/data/x"), b'"/data/x"'),
            (collections.Counter("aab"), b'{"a":2,"b":1}'),
            ((1, {2}), b"[1,[2]]"),
            (2**80, b"1208925819614629174706176"),
        ],
    )
    def test_has_a_json_form(self, value, json):
        assert executor_target.encode_result(value, 1000, 1000, filed=False) == json
        msgspec.json.decode(json)

    @pytest.mark.parametrize("value", [object(), Opaque, lambda: 1, (n for n in "ab"), "\ud800", {(1, 2): 3}, 1j])
    def test_what_has_none_is_named_with_the_remedy(self, value):
        with pytest.raises(executor_target.ResultNotSerialisable, match=f"{type(value).__name__}.*return numbers"):
            executor_target.encode_result(value, 1000, 1000, filed=False)

    def test_what_holds_itself_is_refused(self):
        loop: list[Any] = []
        loop.append(loop)
        with pytest.raises(executor_target.ResultNotSerialisable):
            executor_target.encode_result(loop, 1000, 1000, filed=False)

    def test_a_result_over_the_limit_is_refused(self):
        assert len(executor_target.encode_result("x" * 98, 100, 100, filed=False)) == 100
        with pytest.raises(
            executor_target.ResultTooLarge, match=r"101 bytes .* limit is 100 \(tasks.result_bytes_max\): write it to a file"
        ):
            executor_target.encode_result("x" * 99, 1000, 100, filed=True)


class Awkward(Exception):
    def __str__(self):
        raise RuntimeError


def failure_of(error):
    try:
        raise error
    except BaseException as caught:  # noqa: BLE001
        return executor_target.failure_of(caught, frames_skipped=0)


class TestFailure:
    def test_name_message_and_traceback(self):
        secret = "hidden in a local variable"  # noqa: F841
        name, message, trace, bases = failure_of(ValueError("no good"))
        assert bases == ("ValueError", "Exception", "BaseException")
        assert (name, message) == ("ValueError", "no good")
        assert trace.startswith("Traceback (most recent call last):")
        assert trace.endswith("ValueError: no good\n")
        assert "hidden" not in trace

    def test_is_bounded(self):
        def deep(levels: int):
            return deep(levels - 1) if levels else 1 / 0

        _, message, *_ = failure_of(ValueError("x" * 10_000))
        assert len(message) == executor_target.MESSAGE_CHARS_MAX
        with pytest.raises(ZeroDivisionError) as caught:
            deep(500)
        _, _, trace, _ = executor_target.failure_of(caught.value, frames_skipped=0)
        assert len(trace) <= executor_target.TRACEBACK_CHARS_MAX
        assert trace.endswith("ZeroDivisionError: division by zero\n")

    def test_sys_exit_says_so(self):
        assert failure_of(SystemExit(3))[:2] == ("SystemExit", "the function called sys.exit(3)")

    def test_an_exception_without_a_text_is_still_a_failure(self):
        assert failure_of(Awkward())[:2] == ("Awkward", "its text cannot be shown: str() raised RuntimeError")

    def test_text_that_has_no_utf8_form_is_escaped(self):
        name, message, trace, _ = failure_of(ValueError("\ud800"))
        assert message == "\\ud800"
        msgspec.json.encode([name, message, trace])

    def test_our_own_refusals_show_no_frames_of_ours(self):
        assert failure_of(executor_target.InvalidArguments("bad"))[2] == ""
