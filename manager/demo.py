"""The demo's main job: train a network on handwritten digits in one task, read all 1,797 images in many, compare.

Everything goes over REST, through the client. Owns what is asked for and what is shown. It knows no cluster of its own:
the caller brings a client, and the same model's answers in one process to compare with.
"""

import importlib.util
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec
from rich.console import Console

from manager.client import Client, Task, task_request
from manager.core.answers_nodes import WorkerView
from manager.core.errors import RocyardError
from manager.core.quantities import GIB, format_memory
from manager.demo_scaling import ScalingReport, run_scaling, why_not
from manager.demo_scaling_screen import scaling_view, show_scaling
from manager.demo_screen import IMAGES, DevicePeak, Report, progress_bar, show

SIZES_BYTES: Final = (24 * GIB, 48 * GIB)
"""What classifying tasks ask for, in turn."""
HELD_SHARE: Final = 0.75
"""How much of what it asked for a task takes, where devices are simulated."""
SAMPLE_S: Final = 0.2
WAITERS: Final = 16
TASK_S_MAX: Final = 300.0
"""A task of this demo takes milliseconds; after so long something is wrong, and the demo says so."""


class Slice(msgspec.Struct, frozen=True):
    """What one task answered, and where it ran."""

    predictions: list[int]
    correct: int
    device: str
    node: str


class _Answer(msgspec.Struct, frozen=True):
    """As much as is used of the result of `digits_classify`."""

    predictions: list[int]
    correct: int
    device: str


class _Trained(msgspec.Struct, frozen=True):
    """As much as is used of the result of `digits_train`."""

    weights: str
    accuracy: float


class Watch(threading.Thread):
    """Looks at the devices several times a second and keeps the most of each."""

    def __init__(self, client: Client) -> None:
        super().__init__(name="demo-watch", daemon=True)
        self._client = client
        self._done = threading.Event()
        self._peaks: dict[tuple[str, str], DevicePeak] = {}

    def run(self) -> None:
        while not self._done.wait(SAMPLE_S):
            try:
                self._take(self._client.workers())
            except RocyardError:
                continue  # one look less; whether the tasks went well does not hang on it

    def stop(self) -> tuple[DevicePeak, ...]:
        """Stop looking; the peaks, by node and device."""
        self._done.set()
        self.join()
        return tuple(sorted(self._peaks.values(), key=lambda peak: (peak.node, peak.index)))

    def _take(self, workers: Iterable[WorkerView]) -> None:
        for worker in workers:
            for device in worker.devices:
                before = self._peaks.get((worker.node, device.uuid))
                self._peaks[worker.node, device.uuid] = DevicePeak(
                    node=worker.node,
                    index=device.index,
                    model=device.model,
                    usable_bytes=device.usable_bytes,
                    leased_bytes=max(device.leased_bytes, before.leased_bytes if before else 0),
                    used_bytes=max(device.used_bytes or 0, before.used_bytes if before else 0),
                )


def missing_packages() -> list[str]:
    """What the demo needs and this interpreter, which the agents also use, does not have."""
    needed = {"torch": "torch", "sklearn": "scikit-learn"}
    return [name for module, name in needed.items() if importlib.util.find_spec(module) is None]


def run_demo(
    client: Client,
    console: Console,
    tasks: int,
    classify_here: Callable[[str], Sequence[int]],
    *,
    as_json: bool = False,
    scaling: bool = False,
) -> int:
    """Run it and print what came out.

    Args:
        client: of the cluster to use.
        console: where people look.
        tasks: how many tasks share the images.
        classify_here: all predictions of a model in this process.
        as_json: print one JSON object instead.
        scaling: with the second act, where nodes can be added.

    Returns:
        0 if every prediction is there and equal to that of one process, and nodes came and went without harm, else 1.
    """
    say: Callable[[str], None] = (lambda _: None) if as_json else console.print
    sizes = memory_sizes(client.workers())
    say("training a 64-32-10 network on handwritten digits, as one task …")
    began_s = time.monotonic()
    trained = msgspec.convert(client.submit("digits_train", memory=sizes[0]).result(TASK_S_MAX), _Trained)
    train_s = time.monotonic() - began_s
    say(f"trained in {train_s:.1f} s; accuracy {trained.accuracy:.1%} on images it has not seen")
    say(f"reading {IMAGES:,} images in {tasks} tasks of {', '.join(format_memory(size) for size in sizes)} …")
    watch = Watch(client)
    watch.start()
    began_s = time.monotonic()
    submitted = client.submit_many(
        task_request(
            "digits_classify",
            {
                "weights": trained.weights,
                "start": IMAGES * n // tasks,
                "stop": IMAGES * (n + 1) // tasks,
                "memory_bytes": int(sizes[n % len(sizes)] * HELD_SHARE),
            },
            memory=sizes[n % len(sizes)],
        )
        for n in range(tasks)
    )
    slices = _collect(submitted, None if as_json else console)
    elapsed_s = time.monotonic() - began_s
    peaks = watch.stop()
    predictions = [digit for part in slices for digit in part.predictions]
    expected = list(classify_here(trained.weights))
    report = Report(
        tasks=len(slices),
        images=len(predictions),
        accuracy=trained.accuracy,
        correct=sum(part.correct for part in slices),
        equal=sum(a == b for a, b in zip(predictions, expected, strict=False)),
        train_s=train_s,
        elapsed_s=elapsed_s,
        tasks_per_s=len(slices) / elapsed_s,
        places=places_of(slices),
        peaks=peaks,
    )
    held = report.images == len(expected) == report.equal == IMAGES
    if not as_json:
        show(report, console, held=held)
    if scaling:
        report = msgspec.structs.replace(report, scaling=_second_act(client, console, say, as_json=as_json))
    if as_json:
        console.print_json(msgspec.json.encode(report).decode())
    return 0 if held and (report.scaling is None or report.scaling.held) else 1


def _second_act(client: Client, console: Console, say: Callable[[str], None], *, as_json: bool) -> ScalingReport | None:
    """Nodes come and go; None where they cannot, which is said."""
    say("")
    reason = why_not(client)
    if reason:
        say(f"the second act, in which nodes come and go, is left out: {reason}")
        return None
    with scaling_view(None if as_json else console) as look:
        found = run_scaling(client, say, look)
    if not as_json:
        show_scaling(found, console)
    return found


def memory_sizes(workers: Iterable[WorkerView]) -> tuple[int, ...]:
    """What to ask for: the usual sizes that fit on the largest device, else shares of it."""
    largest = max((device.usable_bytes for worker in workers for device in worker.devices), default=0)
    fitting = tuple(size for size in SIZES_BYTES if size <= largest)
    if len(fitting) >= 2 or not largest:
        return fitting or SIZES_BYTES
    return tuple(largest * eighths // 8 for eighths in (1, 2, 3, 4))


def places_of(slices: Iterable[Slice]) -> tuple[tuple[str, str, int], ...]:
    """How many tasks ran on which node and device."""
    counted = Counter((part.node, part.device) for part in slices)
    return tuple((node, device, number) for (node, device), number in sorted(counted.items()))


def _collect(submitted: Sequence[Task], console: Console | None) -> list[Slice]:
    """All answers, in the order of the tasks; a bar shows how many are there.

    Raises:
        TaskFailed, TaskCancelled, WaitTimeout: of the first task that gave no answer.
    """
    with progress_bar(console, len(submitted)) as advance, ThreadPoolExecutor(WAITERS) as pool:
        futures = [pool.submit(_answer, task, advance) for task in submitted]
        return [future.result() for future in futures]


def _answer(task: Task, advance: Callable[[], None]) -> Slice:
    answer = msgspec.convert(task.result(TASK_S_MAX), _Answer)
    node = task.view().node or "?"
    advance()
    return Slice(answer.predictions, answer.correct, answer.device, node)
