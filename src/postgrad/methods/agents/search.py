"""A search engine over the Python standard library's documentation, as a tool."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from postgrad.config import Settings, setting
from postgrad.errors import MissingExtra
from postgrad.methods.agents.calls import Calls
from postgrad.sampling.conversations import Session
from postgrad.tasks.documentation import Passage, passages

_WORD = re.compile(r"[a-z0-9]+")


class SearchSettings(Settings):
    opening: str = setting("<search>", "opens a call", min_length=1)
    closing: str = setting("</search>", "closes a call", min_length=1)
    before: str = setting("<result>", "before what was found")
    after: str = setting("</result>", "after what was found")
    passages: int = setting(3, "best passages that are shown", gt=0)
    characters: int = setting(300, "of a passage that are shown", gt=0)


class Search:
    """the standard library's documentation: `<search>words</search>` is answered by passages

    The best passages by BM25 stand between `<result>` and `</result>`. Nothing leaves the machine.
    """

    Config = SearchSettings
    parallel = 1

    def __init__(self, config: SearchSettings):
        self.stop: tuple[str, ...] = (config.closing,)
        self._config = config
        try:
            import bm25s  # noqa: F401
        except ImportError as error:
            raise MissingExtra("bm25s", "tools") from error

    def session(self, row: Mapping[str, Any]) -> Session:
        config = self._config
        return Calls(config.opening, config.closing, self.found, config.before, config.after)

    def found(self, query: str) -> str:
        """The best passages for a query, one after the other."""
        texts = [passage.text for passage in index().best(query, self._config.passages)]
        return "\n\n".join(text[: self._config.characters].rstrip() for text in texts) or "nothing"


class Index:
    """Passages that can be searched by their words."""

    def __init__(self, found: Sequence[Passage]):
        import bm25s

        self.passages = found
        self._ranking = bm25s.BM25()
        self._ranking.index([words(passage.text) for passage in found], show_progress=False)

    def best(self, query: str, count: int) -> list[Passage]:
        """At most `count` passages that share a word with the query, the best first."""
        known = [word for word in words(query) if word in self._ranking.vocab_dict]
        if not known:
            return []
        places, scores = self._ranking.retrieve(
            [known], k=min(count, len(self.passages)), show_progress=False
        )
        ranked = zip(places[0].tolist(), scores[0].tolist(), strict=True)
        return [self.passages[place] for place, score in ranked if score > 0]


@cache
def index() -> Index:
    """The index of the standard library's documentation, made at first use."""
    return Index(passages())


def words(text: str) -> list[str]:
    """Words in lower case; the parts of a name such as `get_close_matches` are words."""
    return _WORD.findall(text.lower())
