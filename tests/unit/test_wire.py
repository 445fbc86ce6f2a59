"""The wire between agent and executor: frames survive any cut, limits hold, and yesterday's bytes decode today."""

import itertools
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.core import wire

CALL = wire.Call("01jq3v5x7y9zabcdefghjkmnpq", 3, "package.module:function", b'{"x":1}')
IN_ARRAY = wire.Call("id", 1, "a:b", b"{}", 7, 1000, "/shared/checkpoint-3", "/shared", "/shared/writing/id-1.json")
TO_EXECUTOR = [wire.Batch(()), wire.Batch((CALL,)), wire.Batch((CALL, IN_ARRAY)), wire.Describe(("a:b", "c:d.e"))]
FROM_EXECUTOR = [
    wire.Ready(4711, "3.11.7"),
    wire.Done("id", 1, True, b"null", 0.25),
    wire.Note("id", 1, 0.5, "half", "/shared/checkpoint-4"),
    wire.Note("id", 1, None, None, "/shared/checkpoint-4"),
    wire.Done("id", 2, False, b'{"type":"E"}', 0.25, 10, 0.5, True),
    wire.Done("id", 3, True, b"", 0.25, file_bytes=300_000, file_sha256="ab" * 32),
    wire.Described((wire.Description("a:b", b"{}", "doc"), wire.Description("c:d", error="gone"))),
]


@pytest.mark.parametrize("message", TO_EXECUTOR)
def test_what_goes_down_comes_out_as_it_was(message):
    (frame,) = wire.FrameReader().feed(wire.pack(message))
    assert wire.decode_to_executor(frame) == message


@pytest.mark.parametrize("message", FROM_EXECUTOR)
def test_what_comes_up_comes_out_as_it_was(message):
    (frame,) = wire.FrameReader().feed(wire.pack(message))
    assert wire.decode_from_executor(frame) == message


@given(cuts=st.lists(st.integers(0, 400), max_size=12))
def test_frames_do_not_depend_on_how_the_stream_is_cut(cuts):
    stream = b"".join(wire.pack(message) for message in FROM_EXECUTOR)
    borders = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    reader = wire.FrameReader()
    frames = [frame for start, end in itertools.pairwise(borders) for frame in reader.feed(stream[start:end])]
    assert [wire.decode_from_executor(frame) for frame in frames] == FROM_EXECUTOR


def test_frames_come_out_byte_by_byte():
    reader = wire.FrameReader()
    counts = [len(reader.feed(bytes([byte]))) for byte in wire.pack(TO_EXECUTOR[1])]
    assert sum(counts) == counts[-1] == 1


def test_a_frame_over_the_limit_is_refused_before_it_is_collected():
    with pytest.raises(ValueError, match="over the limit"):
        wire.FrameReader().feed((wire.FRAME_BYTES_MAX + 1).to_bytes(4, "big"))


def test_a_message_over_the_limit_is_not_sent(monkeypatch):
    monkeypatch.setattr(wire, "FRAME_BYTES_MAX", 100)
    with pytest.raises(ValueError, match="over the limit of 100"):
        wire.pack(wire.Done("id", 1, True, b"x" * 100, 0.0))


@pytest.mark.parametrize("junk", [b"", b"\xc1", b"\x00", b"\x93\xa4done", msgspec.msgpack.encode(["nothing", 1])])
def test_junk_is_an_error_and_nothing_else(junk):
    with pytest.raises(msgspec.MsgspecError):
        wire.decode_from_executor(junk)


def test_yesterdays_answers_decode():
    """Golden bytes: fields may be added at the end, with defaults; none may move or go."""
    old = msgspec.msgpack.encode(["done", "id", 1, True, b"null", 0.25])
    assert wire.decode_from_executor(old) == wire.Done("id", 1, True, b"null", 0.25)
    golden = bytes.fromhex(
        "95a463616c6cba30316a71337635783779397a61626364656667686a6b6d6e70"
        "7103b77061636b6167652e6d6f64756c653a66756e6374696f6ec4077b2278223a317d"
    )
    assert msgspec.msgpack.decode(golden, type=wire.Call) == CALL


def test_a_failure_is_plain_json():
    failure = wire.Failure("ValueError", "no", "Traceback …")
    data = wire.encode_failure(failure)
    assert msgspec.json.decode(data) == {"type": "ValueError", "message": "no", "traceback": "Traceback …", "bases": []}
    assert wire.decode_failure(data) == failure
    assert wire.decode_failure(b'{"type": "E", "message": "of an older executor"}').bases == ()


def test_tokens_and_the_shared_page_have_their_sizes():
    assert (wire.TOKEN.size, wire.STARTED.size) == (8, 16)
    assert [number for (number,) in wire.TOKEN.iter_unpack(wire.TOKEN.pack(1) + wire.TOKEN.pack(2**40))] == [1, 2**40]


def test_it_imports_msgspec_and_the_standard_library_only():
    """An executor's interpreter may have nothing else."""
    code = (
        "import sys, importlib.util as u;"
        f"s = u.spec_from_file_location('w', {wire.__file__!r}); m = u.module_from_spec(s); sys.modules['w'] = m;"
        "s.loader.exec_module(m);"
        "print(sorted({n.partition('.')[0] for n in sys.modules} - set(sys.stdlib_module_names) - {'__main__', 'w'}))"
    )
    # Without an environment: a measurement of coverage would put itself into the process.
    output = subprocess.run([sys.executable, "-I", "-c", code], env={}, capture_output=True, text=True, check=True).stdout
    foreign = set(msgspec.json.decode(output.replace("'", '"'))) - {"_distutils_hack", "sitecustomize"}
    assert foreign <= {"msgspec", "typing_extensions"}
