# %% [markdown]
# # GPU memory for Dask tasks
#
# Start a cluster first (`rocyard up`), then run this file, or open it as a notebook (Jupytext reads the cells).
# `DASK_SCHEDULER_ADDRESS` names another scheduler than that of this machine.

# %%
import operator
import os

from distributed import Client

import rocyard

client = Client(os.environ.get("DASK_SCHEDULER_ADDRESS", "tcp://127.0.0.1:8786"), timeout=20)
print("connected to", client.scheduler.address)

# %% [markdown]
# ## One task
#
# A task that is made inside `rocyard.gpu(…)` gets GPU memory of its own: it waits until a device has room, and runs in a
# process of its own that sees no other device. `dask.annotate(gpu={"memory": "16GiB"})` says the same without our package.


# %%
def where_am_i() -> tuple[list[str], int]:
    return os.environ["ROCYARD_DEVICES"].split(","), os.getpid()


with rocyard.gpu(memory="16GiB"):
    one = client.submit(where_am_i, pure=False)
with rocyard.gpu(memory="16GiB", count=2):
    two = client.submit(where_am_i, pure=False)
print("one device: ", one.result()[0])
print("two devices:", two.result()[0])

# %% [markdown]
# ## Many tasks, and what comes of them
#
# `map`, dependencies and plain tasks mix freely: only what was made inside the block needs a device.

# %%
with rocyard.gpu(memory="8GiB"):
    squares = client.map(lambda x: x * x, range(12))
total = client.submit(sum, squares)  # on a CPU
print("sum of squares:", total.result())

# %% [markdown]
# ## Priorities and retries are Dask's own

# %%
with rocyard.gpu(memory="8GiB"):
    urgent = client.submit(operator.add, 1, 1, priority=10, retries=2)
print("urgent:", urgent.result())

# %% [markdown]
# ## Why does it wait?

# %%
with rocyard.gpu(memory="900GiB"):
    never = client.submit(operator.add, 2, 2, pure=False)
client.submit(operator.add, 3, 3).result()  # the scheduler has seen it by now
print(rocyard.explain(never))
never.cancel()

# %% [markdown]
# ## Errors say what was wrong

# %%
with rocyard.gpu(memory="1GiB"):
    wrong = client.submit(operator.truediv, 1, 0)
    crash = client.submit(os.abort, pure=False)
for future in (wrong, crash):
    try:
        future.result()
    except (ZeroDivisionError, rocyard.GpuTaskCrashed) as error:
        print(type(error).__name__, "-", error)
try:
    rocyard.gpu(memory="16 apples")
except rocyard.GpuAnnotationRefused as error:
    print(type(error).__name__, "-", error)

# %%
client.close()
