"""The environment of an executor: what user code may see of the agent's, name by name.

Owns the list. Everything that is not on it stays outside, so a credential in the agent's environment reaches no task.
"""

from collections.abc import Mapping
from typing import Final

KEPT: Final = (
    # what any program needs
    "PATH",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "USER",
    "LOGNAME",
    # where the libraries of ROCm and CUDA are, and what makes them work on this machine's devices
    "LD_LIBRARY_PATH",
    "ROCM_PATH",
    "ROCM_HOME",
    "HIP_PATH",
    "HSA_OVERRIDE_GFX_VERSION",
    "HSA_XNACK",
    "HSA_ENABLE_SDMA",
    "CUDA_HOME",
    "CUDA_PATH",
    # where certificates of authorities are: files that anybody may read
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    # threads of numeric libraries: what the operator set for the agent, and never a guess of ours
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
)
"""Variables that pass from the agent to its executors. LD_PRELOAD, PYTHONPATH and proxies (whose URLs may hold a
password) are left out on purpose, and so is every visibility variable: the device source sets those for each slot."""


def scrubbed_environment(base_environ: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of one executor.

    Args:
        base_environ: the agent's environment.
        extra: what the agent adds: ``HOME`` (the slot's private scratch directory), the visibility variables of the
            device source, ``ROCYARD_DEVICES``. ``TMPDIR`` is ``HOME`` unless it stands here. It wins over `KEPT`.

    Raises:
        KeyError: `extra` has no ``HOME``.
    """
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "USER": "rocyard",
        "LOGNAME": "rocyard",
        **{name: base_environ[name] for name in KEPT if name in base_environ},
        "PYTHONSAFEPATH": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONUTF8": "1",
        "TMPDIR": extra["HOME"],
        **extra,
    }
