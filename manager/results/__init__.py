"""Where results lie that are too large for the store's records, and checkpoints of tasks."""

from manager.results.opening import open_results, shared_url, with_default_folder
from manager.results.store import Leftover, NoResults, ResultStore

__all__ = ["Leftover", "NoResults", "ResultStore", "open_results", "shared_url", "with_default_folder"]
