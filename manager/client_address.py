"""Where the cluster is and whose key to use: arguments, else variables, else the file that `rocyard up` writes.

Owns the order and the file's form. Reads no environment of its own: the caller gives the variables. A key out of the
file is only ever used for the URL in the same file, so that no other host is sent it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from manager.core.errors import SettingsError
from manager.settings import Secret, Settings

URL_VARIABLE: Final = "ROCYARD_URL"
KEY_VARIABLE: Final = "ROCYARD_API_KEY"
CA_VARIABLE: Final = "ROCYARD_CA"
FOLDER_VARIABLE: Final = "ROCYARD_DATA_DIR"
GIVEN: Final = "an argument"
FILE_NAME: Final = "client.json"
FILE_BYTES_MAX: Final = 64 * 1024
"""A hundred times a real one."""


class ClientFile(msgspec.Struct, frozen=True):
    """What `rocyard up` leaves in its data folder, mode 0600, for clients on this machine."""

    url: str
    api_key: str
    ca: str = ""


class ClusterAddress(msgspec.Struct, frozen=True):
    """A cluster and a key for it.

    Attributes:
        url: without a slash at its end.
        source: where the URL came from, for messages.
        key_source: where the key came from.
        ca: path of the certificate of the authority that an https cluster must be of. Empty: one that this machine trusts.
    """

    url: str
    api_key: Secret
    source: str
    key_source: str
    ca: str = ""


def client_file(data_dir: str) -> Path:
    """The file of the local cluster whose data lies in `data_dir`."""
    return Path(data_dir).expanduser() / FILE_NAME


def find_cluster(
    url: str | None, api_key: str | None, variables: Mapping[str, str], data_dir: str | None = None, ca: str | None = None
) -> ClusterAddress:
    """The cluster to talk to.

    Args:
        url: wins where it is given.
        api_key: as `url`.
        variables: the environment, read for ROCYARD_URL, ROCYARD_API_KEY, ROCYARD_CA and ROCYARD_DATA_DIR.
        data_dir: the folder of the local cluster, where the settings name one.
        ca: as `url`.

    Raises:
        SettingsError: nothing was found, or only half of it; says what to do.
    """
    source = GIVEN if url else URL_VARIABLE
    key_source = GIVEN if api_key else KEY_VARIABLE
    url = url or variables.get(URL_VARIABLE) or ""
    api_key = api_key or variables.get(KEY_VARIABLE) or ""
    ca = ca or variables.get(CA_VARIABLE) or ""
    if url and api_key:
        return ClusterAddress(checked_url(url), Secret(api_key), source, key_source, ca or _known_ca(url, data_dir, variables))
    path = client_file(data_dir or variables.get(FOLDER_VARIABLE) or Settings().data_dir)
    found = _read(path)
    if not url:
        if found is None:
            raise SettingsError(
                f"No cluster is known: {path} does not exist. Start one with 'rocyard up', or set {URL_VARIABLE} and "
                f"{KEY_VARIABLE}."
            )
        key_source = key_source if api_key else str(path)
        return ClusterAddress(checked_url(found.url), Secret(api_key or found.api_key), str(path), key_source, ca or found.ca)
    if found is not None and checked_url(found.url) == checked_url(url):
        return ClusterAddress(checked_url(url), Secret(found.api_key), source, str(path), ca or found.ca)
    raise SettingsError(f"No API key for {url}: set {KEY_VARIABLE} (an admin makes keys with 'rocyard keys create').")


def _known_ca(url: str, data_dir: str | None, variables: Mapping[str, str]) -> str:
    """The authority of the local cluster, where `url` is that one's; a file that cannot be read says nothing here."""
    try:
        found = _read(client_file(data_dir or variables.get(FOLDER_VARIABLE) or Settings().data_dir))
    except SettingsError:
        return ""
    return found.ca if found is not None and found.url == checked_url(url) else ""


def checked_url(url: str) -> str:
    """`url` without a slash at its end.

    Raises:
        SettingsError: it is none of a cluster.
    """
    try:
        parts = urlsplit(url)
        sound = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        user = parts.username is not None
        (parts.hostname or "").encode("idna")
    except ValueError:  # a port that is no number, half an IPv6 address, or a host's name that no resolver takes
        sound, user = False, False
    if user:
        # It is not shown: a password may stand in it.
        raise SettingsError(
            f"the URL of a cluster has no user and no password: write one such as 'http://127.0.0.1:8000', and the key into "
            f"{KEY_VARIABLE}."
        )
    if not sound or "?" in url or "#" in url or not url.isascii() or not url.isprintable() or " " in url:
        raise SettingsError(f"{url[:80]!r} is no URL of a cluster: write one such as 'http://127.0.0.1:8000'.")
    return url.rstrip("/")


def checked_key(api_key: str, source: str) -> str:
    """`api_key`, if it can be sent.

    Raises:
        SettingsError: it cannot; the message does not show it.
    """
    if not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise SettingsError(
            f"The API key from {source} has signs that no key has, such as a space, an end of line or an umlaut: a key "
            "looks like 'ry_…'."
        )
    return api_key


def _read(path: Path) -> ClientFile | None:
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(FILE_BYTES_MAX), type=ClientFile)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror}): set {URL_VARIABLE} and {KEY_VARIABLE}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is damaged: start the cluster again with 'rocyard up' to write it anew.") from error
