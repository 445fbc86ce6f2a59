"""Built-in functions of the demonstration: a small network learns handwritten digits, then reads them slice by slice.

The pictures are scikit-learn's 1,797 (8×8 grey values), which come with that package. Everything is computed so that a
slice gives exactly what the whole gives: weights are float32, and reading is done in float64, where the order in which
a device adds up changes no answer.
"""

import base64
import contextlib
import functools
import importlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from plugins.node.functions.torch_device import TorchDevice, torch_device

MEMORY_BYTES = 256 * 1024**2
"""What a task holds of a simulated device unless it says otherwise."""

HIDDEN = 32
HELD_OUT_EVERY = 6
"""The network learns all images but every sixth; `accuracy` is of those."""

Memory = Annotated[int, msgspec.Meta(ge=0)]


def digits_train(
    epochs: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 150, seed: int = 0, memory_bytes: Memory = MEMORY_BYTES
) -> dict[str, Any]:
    """Train a 64-32-10 network on scikit-learn's handwritten digits.

    Args:
        epochs: steps over all training images.
        seed: of the first weights.
        memory_bytes: held meanwhile, where the device is simulated.

    Returns:
        ``weights`` for `digits_classify` (base64 of an npz file, about 15 KB), ``accuracy`` on the images that it did
        not learn, ``loss``, ``device``.
    """
    images, labels = _digits()
    held_out = np.arange(len(images)) % HELD_OUT_EVERY == 0
    with torch_device(memory_bytes) as place, _one_thread(place.torch):
        torch, device = place.torch, place.device
        torch.manual_seed(seed)
        layers = (torch.nn.Linear(64, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 10))
        network = torch.nn.Sequential(*layers).to(device)
        x = torch.tensor(images[~held_out], dtype=torch.float32, device=device)
        y = torch.tensor(labels[~held_out], device=device)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        for _ in range(epochs):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(x), y)
            loss.backward()
            optimizer.step()
        state = network.state_dict()
        arrays = {name.replace(".", "_"): value.cpu().numpy() for name, value in state.items()}
        predictions = _read(place, arrays, images[held_out])
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    return {
        "weights": base64.b64encode(packed.getvalue()).decode(),
        "accuracy": float(np.mean(np.array(predictions) == labels[held_out])),
        "loss": loss.item(),
        "device": place.label,
    }


def digits_classify(
    weights: str,
    start: Annotated[int, msgspec.Meta(ge=0)] = 0,
    stop: Annotated[int, msgspec.Meta(ge=0)] | None = None,
    memory_bytes: Memory = MEMORY_BYTES,
) -> dict[str, Any]:
    """Read images `start` to `stop` of scikit-learn's handwritten digits.

    Args:
        weights: what `digits_train` returned as such.
        start, stop: a slice of the 1,797 images; without `stop`, up to the last one.
        memory_bytes: held meanwhile, where the device is simulated.

    Returns:
        ``predictions``, one digit for each image; ``correct``, how many are right; ``device``.
    """
    images, labels = _digits()
    arrays = _unpacked(weights)
    with torch_device(memory_bytes) as place, _one_thread(place.torch):
        predictions = _read(place, arrays, images[start:stop])
    return {
        "predictions": predictions,
        "correct": int(np.sum(np.array(predictions, dtype=labels.dtype) == labels[start:stop])),
        "device": place.label,
    }


def _read(place: TorchDevice, arrays: dict[str, Any], images: Any) -> list[int]:
    torch = place.torch
    layers = {name: torch.tensor(array, dtype=torch.float64, device=place.device) for name, array in arrays.items()}
    x = torch.tensor(images, dtype=torch.float64, device=place.device)
    hidden = torch.relu(x @ layers["0_weight"].T + layers["0_bias"])
    scores = hidden @ layers["2_weight"].T + layers["2_bias"]
    result: list[int] = scores.argmax(dim=1).tolist()
    return result


@functools.cache
def _digits() -> tuple[Any, Any]:
    """Images (1797, 64) from 0 to 1, and their digits (1797,); kept from task to task in one executor."""
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "this function needs scikit-learn, which the interpreter of its executor does not have: "
            "pip install 'rocyard[demo]' there, and restart the node"
        )
    # The same file that sklearn.datasets.load_digits reads; importing that takes two seconds in each executor.
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if path.exists():
        table = np.loadtxt(path, delimiter=",", dtype=np.int64)
        return table[:, :-1] / 16.0, table[:, -1]
    digits = importlib.import_module("sklearn.datasets").load_digits()
    return digits.data / 16.0, digits.target


@functools.lru_cache(maxsize=8)
def _unpacked(weights: str) -> dict[str, Any]:
    """Arrays of the weights; kept from task to task, as a model is."""
    try:
        with np.load(io.BytesIO(base64.b64decode(weights, validate=True)), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        shapes = [arrays[name].shape for name in ("0_weight", "0_bias", "2_weight", "2_bias")]
    except Exception as error:
        raise ValueError("the weights are not what digits_train returned") from error
    if shapes != [(HIDDEN, 64), (HIDDEN,), (10, HIDDEN), (10,)]:
        raise ValueError("the weights are of another network than digits_train makes")
    return arrays


@contextlib.contextmanager
def _one_thread(torch: Any) -> Iterator[None]:
    """Torch computes in one thread inside the block: small tensors are faster so, and sums keep their order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
