"""The store: the only package that imports redis. `Store` is its face; the rest is how it is done."""

from manager.store.connection import StoreConnection
from manager.store.store import Store

__all__ = ["Store", "StoreConnection"]
