"""Stands in for the store's program: becomes the real one, after the power cut that was asked for.

``python store_program.py FOLDER PROGRAM PORT ARGUMENTS …``, with the server's configuration on stdin. Standard library only.

A power cut takes from the disk what was not synced: the note of `synced.c` beside each log file says how much of it was. It
is done here, between the end of the killed server and the start of the next, so whoever supervises the store needs to know
nothing of it. PORT, if it is not 0, is listened on instead of the configured one, where a proxy listens.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

CUT = "cut-power"
STARTS = "starts.jsonl"


def main(folder: Path, program: str, port: int, arguments: list[str]) -> None:
    """Become the server."""
    if arguments != ["-"]:
        os.execv(program, [program, *arguments])  # it is asked for its version
    configuration = sys.stdin.buffer.read()
    if port:
        configuration = re.sub(rb"^port \d+$", b"port %d" % port, configuration, flags=re.MULTILINE)
    data = _data_folder(configuration)
    cut = folder / CUT
    taken = _cut_power(data, folder / "synced") if cut.exists() else {}
    cut.unlink(missing_ok=True)
    with (folder / STARTS).open("a") as file:
        file.write(json.dumps({"at": time.monotonic(), "pid": os.getpid(), "taken": taken}) + "\n")
    reader, writer = os.pipe()
    os.write(writer, configuration)  # it fits into a pipe
    os.close(writer)
    os.dup2(reader, 0)
    environ = {**os.environ, "CHAOS_SYNCED": str(folder / "synced")}
    if (folder / "synced.so").exists():
        environ["LD_PRELOAD"] = str(folder / "synced.so")
    os.execve(program, [program, "-"], environ)


def _data_folder(configuration: bytes) -> Path:
    found = re.search(rb'^dir "(.*)"$', configuration, re.MULTILINE)
    assert found is not None
    return Path(os.fsdecode(found[1]))


def _cut_power(data: Path, notes: Path) -> dict[str, int]:
    """Cut every log file to what was synced of it; how many bytes that took of each."""
    taken = {}
    for log in sorted(data.rglob("*.incr.aof")):
        note = notes / log.name
        synced = int(note.read_text()) if note.exists() else 0
        size = log.stat().st_size
        if size > synced:
            os.truncate(log, synced)
            taken[log.name] = size - synced
    return taken


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
