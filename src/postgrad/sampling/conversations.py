"""Responses in several turns: the policy calls a tool, reads what it says, and writes on."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from postgrad.models.policy import LanguagePolicy
from postgrad.sampling.drawing import SamplingSettings
from postgrad.sampling.generation import Rollouts, generate
from postgrad.seeding import derive


class Session(Protocol):
    """The tool's side of one conversation."""

    def reply(self, turn: str) -> str | None:
        """What the policy reads after its turn, which ended in a call; None ends the response."""
        ...

    def close(self) -> None: ...


class Tool(Protocol):
    """Something that a policy can call while it writes.

    Attributes:
        stop: the strings that end a turn with a call.
        parallel: how many sessions may be at work at a time, each in a thread of its own.
    """

    stop: tuple[str, ...]
    parallel: int

    def session(self, row: Mapping[str, Any]) -> Session:
        """A new conversation about a row of data."""
        ...


@dataclass
class Conversations(Rollouts):
    """Responses with what a tool said in them.

    Attributes:
        written: `[L]` bool each: the token is the policy's own, and no part of a reply.
        turns: `[L]` each: the number, from 0, of the policy's turn that the token is of, or that
            it answers.
    """

    written: list[Tensor]
    turns: list[Tensor]


def converse(
    policy: LanguagePolicy,
    prompts: Sequence[Tensor],
    rows: Sequence[Mapping[str, Any]],
    tool: Tool,
    settings: SamplingSettings,
    *,
    seeds: Sequence[int],
    max_turns: int,
) -> Conversations:
    """One response to each of N prompts, in at most `max_turns` turns of the policy.

    `settings.max_new_tokens` is the limit of a whole response, replies included: a reply that does
    not fit ends it. Without a call a response is what `generate` draws with the same seed.
    `finished` is false where a limit of tokens or turns cut a response.

    Args:
        policy: what is sampled from.
        prompts: token ids `[P]` each.
        rows: the row of data of each prompt, for the tool.
        tool: what can be called.
        settings: length, temperature, restrictions and further stop strings, which end a response.
        seeds: one for each response.
        max_turns: how often the policy may write.
    """
    if not len(prompts) == len(rows) == len(seeds):
        raise ValueError(f"{len(prompts)} prompts, {len(rows)} rows and {len(seeds)} seeds")
    talks = [_Talk(prompt.to(policy.device)) for prompt in prompts]
    turns = replace(settings, stop=(*settings.stop, *tool.stop))
    sessions = {i: tool.session(row) for i, row in enumerate(rows)}
    pool = ThreadPoolExecutor(tool.parallel)
    try:
        active = list(range(len(talks)))
        for turn in range(max_turns):
            drawn = generate(
                policy,
                [talks[i].so_far for i in active],
                turns,
                seeds=[seeds[i] if turn == 0 else derive(seeds[i], "turn", turn) for i in active],
                limits=[settings.max_new_tokens - talks[i].length for i in active],
            )
            calls: dict[int, Future[str | None]] = {}
            for i, tokens, text, logprobs, ended in zip(
                active, drawn.responses, drawn.texts, drawn.logprobs, drawn.finished, strict=True
            ):
                talks[i].add(tokens, turn, logprobs)
                talks[i].finished = bool(ended)
                at_a_call = any(text.rstrip().endswith(word) for word in tool.stop)
                if ended and at_a_call and int(tokens[-1]) not in policy.end_tokens:
                    calls[i] = pool.submit(sessions[i].reply, text)
            going_on = []
            for i, call in calls.items():
                said = call.result()
                if said is None:
                    continue
                talks[i].finished = False
                reply = policy.encode_response(said, end=False)
                room = min(
                    settings.max_new_tokens - talks[i].length,
                    policy.context_length - len(talks[i].so_far),
                )
                if len(reply) < room:
                    talks[i].add(reply, turn)
                    going_on.append(i)
            _close([sessions.pop(i) for i in set(active).difference(going_on)], tool.parallel)
            active = going_on
            if not active:
                break
    finally:
        pool.shutdown(cancel_futures=True)
        _close(list(sessions.values()), tool.parallel)
    responses = [talk.so_far[len(talk.prompt) :] for talk in talks]
    return Conversations(
        prompts=[talk.prompt for talk in talks],
        responses=responses,
        logprobs=[torch.cat(talk.logprobs) for talk in talks],
        finished=torch.tensor([talk.finished for talk in talks]),
        texts=[policy.decode(response) for response in responses],
        written=[torch.cat(talk.written) for talk in talks],
        turns=[torch.cat(talk.turns) for talk in talks],
    )


def _close(sessions: Sequence[Session], parallel: int) -> None:
    with ThreadPoolExecutor(parallel) as pool:
        for closing in [pool.submit(session.close) for session in sessions]:
            closing.result()


def first_replies(written: Tensor, turns: Tensor, lengths: Tensor) -> Tensor:
    """Where in each response `[N]` the first call has been answered, or -1 where none has.

    It is the place of the first token that follows the call: of the reply or, if that is empty, of
    the next turn.

    Args:
        written: `[N, T]` bool, the policy's own tokens.
        turns: `[N, T]`, numbers of the turns, from 0.
        lengths: `[N]`, tokens of each response.
    """
    if not written.shape == turns.shape or len(lengths) != len(turns):
        raise ValueError(
            f"written and turns must be [N, T] and lengths [N], got {list(written.shape)}, "
            f"{list(turns.shape)} and {list(lengths.shape)}"
        )
    inside = torch.arange(turns.shape[1], device=turns.device) < lengths[:, None]
    after = (~written | (turns > 0)) & inside
    return torch.where(after.any(1), after.int().argmax(1), -1)


class _Talk:
    """One response as it grows."""

    def __init__(self, prompt: Tensor):
        self.prompt = self.so_far = prompt
        self.logprobs: list[Tensor] = []
        self.written: list[Tensor] = []
        self.turns: list[Tensor] = []
        self.finished = False

    @property
    def length(self) -> int:
        return len(self.so_far) - len(self.prompt)

    def add(self, tokens: Tensor, turn: int, logprobs: Tensor | None = None) -> None:
        """The policy's tokens with their log-probabilities, or a reply's without any."""
        self.so_far = torch.cat([self.so_far, tokens])
        own = logprobs is not None
        self.logprobs.append(torch.zeros(len(tokens)) if logprobs is None else logprobs.cpu())
        self.written.append(torch.full((len(tokens),), own))
        self.turns.append(torch.full((len(tokens),), turn))
