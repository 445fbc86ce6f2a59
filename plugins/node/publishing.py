"""The agent's functions: which there are, what they take, and telling the store so that the API can check arguments."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from manager.core.functions import encode_published
from manager.log import get_logger
from manager.settings import FunctionSettings
from manager.store import Store
from plugins.node.registry import FunctionSpec, described, environment_id, load_functions, published

DESCRIBE_S: Final = 30.0
"""For importing one function's module: numeric libraries take seconds on a cold disk."""

log = get_logger("rocyard.agent")


class Functions:
    """One agent's registry.

    Attributes:
        specs: by name; described once `describe` has run.
        version: of Rocyard.
    """

    def __init__(self, configured: Mapping[str, FunctionSettings], environ: Mapping[str, str]) -> None:
        self.specs: dict[str, FunctionSpec] = load_functions(configured)
        self.environ = environ
        self._interpreters = {
            environment_id(spec): (spec.python, (spec.path,) if spec.path else ()) for spec in self.specs.values()
        }
        try:
            self.version = version("rocyard")
        except PackageNotFoundError:
            self.version = "unknown"

    def interpreter(self, environment: str) -> tuple[str, tuple[str, ...]]:
        """Interpreter and import path of an environment; the agent's own for one that no function here has."""
        return self._interpreters.get(environment, ("", ()))

    async def describe(self) -> None:
        """Learn what each function takes, in throw-away executors."""
        found = await described(self.specs, DESCRIBE_S, self.environ)
        # In place: slots that are open already hold this very mapping.
        self.specs.update(found)
        for spec in found.values():
            if spec.error:
                log.error("function_unusable", function=spec.name, error=spec.error)

    async def publish(self, store: Store) -> None:
        """Tell the store."""
        for spec in self.specs.values():
            await store.publish_function(spec.name, encode_published(published(spec)))
        log.info("functions_published", functions=len(self.specs))
