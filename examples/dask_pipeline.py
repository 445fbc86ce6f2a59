# %% [markdown]
# # A pipeline: prepare on CPUs, train on GPUs, choose the best
#
# Needs a running cluster (`rocyard up`) and torch. Each training run is one task with GPU memory of its own; Dask runs the
# preparation and the choice on the CPUs of the same machines, and moves the data.

# %%
import os
from typing import Any

import dask
import numpy as np
from distributed import Client

import rocyard

client = Client(os.environ.get("DASK_SCHEDULER_ADDRESS", "tcp://127.0.0.1:8786"), timeout=20)

# %% [markdown]
# ## The parts
#
# Plain functions. What goes from task to task are plain arrays: a tensor on a device dies with the process that made it.

# %%
Data = tuple[np.ndarray, np.ndarray]


# %%
def load(part: int, rows: int = 400) -> Data:
    """Points in a plane; the question is on which side of a circle each of them is."""
    points = np.random.default_rng(part).uniform(-1, 1, (rows, 2)).astype("float32")
    return points, (np.hypot(*points.T) < 0.75).astype("float32")


def joined(parts: list[Data]) -> Data:
    points, inside = zip(*parts, strict=True)
    return np.concatenate(points), np.concatenate(inside)


def train(data: Data, hidden: int, steps: int = 150) -> dict[str, Any]:
    """A network with one hidden layer; returns its weights as arrays, and its loss."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    points, inside = (torch.from_numpy(array).to(device) for array in data)
    layers = (torch.nn.Linear(2, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 1))
    model = torch.nn.Sequential(*layers).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(points)[:, 0], inside)
        loss.backward()
        optimizer.step()
    print(f"{hidden} hidden units on {device}: loss {loss.item():.3f}")
    return {"weights": [p.detach().cpu().numpy() for p in model.parameters()], "loss": loss.item(), "hidden": hidden}


def accuracy(trained: dict[str, Any], data: Data) -> tuple[int, float]:
    """On data that it has not seen; four small multiplications need no device."""
    first, first_bias, last, last_bias = trained["weights"]
    points, inside = data
    says = np.tanh(points @ first.T + first_bias) @ last.T + last_bias
    return trained["hidden"], float(((says[:, 0] > 0) == inside).mean())


# %% [markdown]
# ## The graph
#
# `dask.delayed` keeps the annotation of the block that a call was made in, so one `compute` runs all of it.

# %%
training = dask.delayed(joined)([dask.delayed(load)(part) for part in range(4)])
unseen = dask.delayed(load)(99)
with rocyard.gpu(memory="4GiB"):
    candidates = [dask.delayed(train)(training, hidden) for hidden in (2, 8, 32)]
scores = [dask.delayed(accuracy)(candidate, unseen) for candidate in candidates]
best = dask.delayed(max)(scores, key=lambda score: score[1])

# %%
results, (hidden, share) = client.gather(client.compute([dask.delayed(list)(scores), best], retries=1))
for units, right in results:
    print(f"{units:3d} hidden units: {right:.1%} right")
print(f"the best has {hidden} hidden units ({share:.1%})")

# %% [markdown]
# ## What the tasks wrote is in the logs of their workers

# %%
for worker, lines in client.get_worker_logs().items():
    for _, line in lines:
        if "hidden units on" in line:
            print(worker, line.splitlines()[-1])

# %%
client.close()
