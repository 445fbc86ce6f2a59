"""Where results lie that are too large for the store's records, and checkpoints of tasks."""

from manager.results.opening import default_folder, open_results
from manager.results.store import Leftover, NoResults, ResultStore

__all__ = ["Leftover", "NoResults", "ResultStore", "default_folder", "open_results"]
