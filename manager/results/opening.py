"""Which results store the settings name."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec

from manager.core.errors import SettingsError
from manager.results.folder import FolderResults
from manager.results.store import NoResults, ResultStore
from manager.settings import Settings


def default_folder(settings: Settings) -> str:
    """Where a cluster of one machine keeps results unless told otherwise."""
    return str(Path(settings.data_dir).expanduser().absolute() / "results")


def with_default_folder(settings: Settings) -> Settings:
    """`settings` of a cluster whose processes are all on this machine."""
    if settings.results.url:
        return settings
    results = msgspec.structs.replace(settings.results, url=default_folder(settings))
    return msgspec.structs.replace(settings, results=results)


def shared_url(settings: Settings) -> str:
    """What another machine can use as well: what somebody has set, and not this machine's own folder."""
    url = settings.results.url
    return "" if url == default_folder(settings) else url


def open_results(settings: Settings, scratch: Path | None = None, *, prepare: bool = True) -> ResultStore:
    """The results store of `settings`.

    Args:
        scratch: an agent's own folder on this machine, for what is to be sent elsewhere; None for who keeps no results.
        prepare: make what is not there yet, and see that it can be written; False for who only reads.

    Raises:
        SettingsError: results.url names no place.
        StartError: it cannot be used from here.
    """
    url = settings.results.url
    if not url:
        return NoResults()
    folder = _folder_of(url)
    if folder is not None:
        results = FolderResults(folder)
        if prepare:
            results.prepare()
        return results
    from manager.results.objects import ObjectResults  # fsspec takes a tenth of a second, and few need it

    objects = ObjectResults(url, scratch)
    if prepare:
        objects.prepare()
    return objects


def _folder_of(url: str) -> Path | None:
    """The folder that `url` means; None where it means no folder.

    Raises:
        SettingsError: a path from where a process happens to be, or on another host.
    """
    parts = urlsplit(url)
    if "://" not in url:
        path = Path(url).expanduser()
    elif parts.scheme == "file":
        if parts.netloc not in {"", "localhost"}:
            raise SettingsError(f"results.url: {url!r} names a host: write file:///path, with three slashes, for a folder")
        path = Path(unquote(parts.path))
    else:
        return None
    if not path.is_absolute():
        raise SettingsError(
            f"results.url: {url!r} is a relative path, which would be another folder for each process: write the whole path, "
            "such as /srv/rocyard/results, or a URL such as s3://bucket/folder"
        )
    return path
