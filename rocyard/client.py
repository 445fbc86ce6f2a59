"""`rocyard.Client`: the client of `manager.client`, told by the environment where its cluster is.

This is a composition root: people who write ``rocyard.Client()`` mean the cluster that their shell means.
"""

import os

import manager.client
from manager.client_address import find_cluster


class Client(manager.client.Client):
    """Talks to one cluster with one key.

    Where arguments are left out: the variables ROCYARD_URL, ROCYARD_API_KEY and ROCYARD_CA, else the cluster that
    `rocyard up` started on this machine (its data folder: ROCYARD_DATA_DIR, else ``~/.rocyard``).

    Args:
        url: such as ``http://127.0.0.1:8000``.
        api_key: such as ``ry_…``.
        ca: path of the cluster's ``ca.pem``, for an https URL of a cluster with an authority of its own.

    Raises:
        rocyard.SettingsError: no cluster is known, or no key for it; says what to do.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, ca: str | None = None) -> None:
        super().__init__(find_cluster(url, api_key, os.environ, ca=ca))
