"""One engine for several training processes: the first of them asks it, and all get the answer."""

from collections.abc import Callable

from postgrad import processes
from postgrad.models.policy import LanguagePolicy
from postgrad.sampling.engines import Asked, AsksAhead, Drawn, Engine, Wanted


class EngineOfFirst:
    """The engine of the first process, in the hands of all; each call is made by all of them.

    Sharded weights are gathered for the moment in which the engine takes them up.

    Args:
        make: makes the engine, in the first process only.

    Raises:
        PostgradError: in all processes, what `make` raised.
    """

    def __init__(self, make: Callable[[], Engine | None]):
        self._made: list[Engine] = []

        def begin() -> None:
            engine = make()
            assert engine is not None
            self._made.append(engine)

        processes.agreed(begin)
        self.exact = processes.agreed(lambda: self._made[0].exact)

    def draw(self, policy: LanguagePolicy, wanted: Wanted) -> list[Drawn]:
        with policy.whole():
            return processes.agreed(lambda: self._made[0].draw(policy, wanted))

    def ask(self, policy: LanguagePolicy, wanted: Wanted) -> "AskedByFirst":
        """As `AsksAhead.ask`, of an engine that does so."""
        asked = AskedByFirst()
        with policy.whole():
            processes.agreed(lambda: asked.made.append(self._ahead().ask(policy, wanted)))
        return asked

    def _ahead(self) -> AsksAhead:
        engine = self._made[0]
        assert isinstance(engine, AsksAhead)  # `rollout.stale` goes with workers only
        return engine

    def metrics(self) -> dict[str, float]:
        return processes.agreed(lambda: self._made[0].metrics())

    def close(self) -> None:
        for engine in self._made:
            engine.close()


class AskedByFirst:
    """What the first process has asked for; what it gets is handed to all."""

    def __init__(self) -> None:
        self.made: list[Asked] = []

    def drawn(self) -> list[Drawn]:
        return processes.agreed(lambda: self.made[0].drawn())

    def drawn_anyhow(self, policy: LanguagePolicy) -> list[Drawn]:
        with policy.whole():
            return processes.agreed(lambda: self.made[0].drawn_anyhow(policy))
