"""The OpenAPI document, made from the operations and the structs that they name: it cannot say what the code does not do.

Pure. Litestar could make one from handlers' signatures, but ours take the raw call.
"""

import inspect
import re
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from manager.api.accept import IDEMPOTENCY_KEY
from manager.api.operations import Operation, Public
from manager.core.answers import Problem
from manager.core.errors import RocyardError
from manager.core.requests import (
    BatchRequest,
    DrainRequest,
    KeyRequest,
    PlanRequest,
    TaskRequest,
    UnloadRequest,
    WarmRequest,
)

_REF: Final = "#/components/schemas/{name}"
_PATH_PARAMETER: Final = re.compile(r"\{([a-z_]+)\}")
_FIELD: Final = re.compile(r"^(?P<names>[a-z_, ]+): (?P<text>.+)$")
_WHAT: Final = {
    "task_id": "A task's id: 26 characters, 0-9 and a-z.",
    "array_id": "An array's id: as a task's; it ends with 0000.",
    "key_id": "A key's id: the 8 characters after ry_.",
    "node": "A node's name, as GET /v1/workers lists it.",
}
_TASK: Final = {"function": "echo", "args": {"x": 1}, "resources": {"memory": "1GiB"}}
_EXAMPLES: Final[dict[type, Any]] = {
    TaskRequest: _TASK,
    PlanRequest: {**_TASK, "count": 3},
    BatchRequest: {"tasks": [_TASK, {**_TASK, "after": [0]}]},
    KeyRequest: {"tenant": "vision", "scope": "user"},
    DrainRequest: {"deadline": "5m", "remove": False},
    WarmRequest: {"function": "echo", "slots": 2, "for": "10m"},
    UnloadRequest: {"function": "echo"},
}
_SUCCESS: Final = {200: "Success", 201: "Made", 202: "Accepted: it is on disk"}


def document(operations: Iterable[Operation], version: str) -> bytes:
    """The document as JSON."""
    listed = [operation for operation in operations if operation.listed]
    types: list[Any] = [Problem]
    for operation in listed:
        types += [kind for kind in (operation.body, operation.answer) if kind is not None]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    by_type = {id(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    classes = _structs(msgspec.Struct)
    paths: dict[str, dict[str, Any]] = {}
    for operation in listed:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, by_type)
    return msgspec.json.encode({
        "openapi": "3.1.0",
        "info": {
            "title": "Rocyard",
            "version": version or "0",
            "summary": "Shares a cluster of GPUs among tasks that ask for GPU memory.",
            "license": {"name": "BSD-3-Clause", "identifier": "BSD-3-Clause"},
        },
        "tags": [{"name": name} for name in dict.fromkeys(_tag(operation.path) for operation in listed)],
        "paths": paths,
        "components": {
            "schemas": {name: _described(name, schema, classes) for name, schema in sorted(components.items())},
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, 'ry_…'. Made with: rocyard keys create --tenant NAME",
                }
            },
        },
    })  # fmt: skip


def _operation(operation: Operation, schemas: dict[int, Any]) -> dict[str, Any]:
    public = isinstance(operation.access, Public)
    found: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "tags": [_tag(operation.path)],
        "parameters": _parameters(operation),
        "responses": _responses(operation, schemas),
        "security": [] if public else [{"key": []}],
    }
    if not isinstance(operation.access, Public):
        found["description"] = f"Takes a key of scope `{operation.access.value}` or one that may more."
    if operation.body is not None:
        content: dict[str, Any] = {"schema": schemas[id(operation.body)]}
        if (example := _EXAMPLES.get(operation.body)) is not None:
            content["example"] = example
        found["requestBody"] = {"required": True, "content": {"application/json": content}}
    return found


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "description": _WHAT[name], "schema": {"type": "string"}}
        for name in _PATH_PARAMETER.findall(operation.path)
    ]
    for parameter in operation.query:
        schema: dict[str, Any] = {"type": parameter.type}
        if parameter.choices:
            schema["enum"] = list(parameter.choices)
        if parameter.most:
            schema |= {"minimum": 1, "maximum": parameter.most}
        found.append({"name": parameter.name, "in": "query", "description": parameter.description, "schema": schema})
    text = {"type": "string", "minLength": 1, "maxLength": 255}
    found += [{"name": one.name, "in": "header", "description": one.description, "schema": text} for one in operation.headers]
    return found


def _responses(operation: Operation, schemas: dict[int, Any]) -> dict[str, Any]:
    success: dict[str, Any] = {"description": _SUCCESS[operation.status]}
    if operation.answer is not None:
        success["content"] = {operation.answer_type: {"schema": schemas[id(operation.answer)]}}
    elif operation.answer_type != "application/json":
        success["content"] = {operation.answer_type: {"schema": {"type": "string"}}}
    headers = {}
    if operation.name == "submit_task":
        headers["Location"] = {"description": "The path of the task or the array.", "schema": {"type": "string"}}
    if IDEMPOTENCY_KEY in operation.headers:
        words = "`true` where this was accepted by an earlier request."
        headers["Idempotency-Replayed"] = {"description": words, "schema": {"type": "string"}}
    if headers:
        success["headers"] = headers
    found = {str(operation.status): success}
    by_status: dict[int, list[type[RocyardError]]] = {}
    for error in operation.all_errors():
        by_status.setdefault(error.status, []).append(error)
    for status, errors in sorted(by_status.items()):
        words = " ".join(f"`{error.__name__}`: {_first_line(error)}" for error in errors)
        problem = {"application/problem+json": {"schema": schemas[id(Problem)]}}
        found[str(status)] = {"description": words, "content": problem}
        if status in {429, 503}:
            found[str(status)]["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return found


def _first_line(error: type[RocyardError]) -> str:
    return (error.__doc__ or error.__name__).strip().splitlines()[0]


def _tag(path: str) -> str:
    parts = path.strip("/").split("/")
    return parts[1] if parts[0] == "v1" else "health"


def _described(name: str, schema: dict[str, Any], classes: dict[str, type]) -> dict[str, Any]:
    """`schema` with what its class and those before it say under ``Attributes:`` moved to the fields."""
    cls = classes.get(name)
    if cls is None or not issubclass(cls, msgspec.Struct):
        return schema
    properties = {field: dict(value) for field, value in schema.get("properties", {}).items()}
    for base in reversed(cls.__mro__):
        if base is not msgspec.Struct and issubclass(base, msgspec.Struct):
            _describe_fields(properties, base)
    return {**schema, "description": _parts(cls)[0], "properties": properties}


def _describe_fields(properties: dict[str, Any], cls: type) -> None:
    names: list[str] = []
    for line in _parts(cls)[1].splitlines():
        match = _FIELD.match(line.strip())
        if match and all(name in properties for name in match.group("names").split(", ")):
            names = match.group("names").split(", ")
            for name in names:
                properties[name]["description"] = match.group("text")
        else:
            for name in names:
                properties[name]["description"] += f" {line.strip()}"


def _parts(cls: type) -> tuple[str, str]:
    head, _, fields = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    return head.strip(), fields


def _structs(root: type) -> dict[str, type]:
    found = {root.__name__: root}
    children: list[type] = root.__subclasses__()
    for child in children:
        found |= _structs(child)
    return found
