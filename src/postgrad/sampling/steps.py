"""The steps of a response: stretches of its tokens that end with a delimiter."""

from collections.abc import Sequence


def step_ends(pieces: Sequence[str], delimiter: str) -> list[int]:
    """The places after the last token of each step, of the texts of a response's tokens.

    A step ends with the token that completes the delimiter, whatever comes next: so the steps of a
    beginning are steps of the whole. One that says nothing goes on into the next, so that blank
    lines are no steps; what is left at the end is the last one. An empty delimiter makes every
    token a step.
    """
    if not delimiter:
        return list(range(1, len(pieces) + 1))
    ends, step = [], ""
    for place, piece in enumerate(pieces):
        step += piece
        newest = len(piece) + len(delimiter) - 1
        if piece and delimiter in step[-newest:] and step.strip():
            ends.append(place + 1)
            step = ""
    if pieces and (not ends or ends[-1] < len(pieces)):
        ends.append(len(pieces))
    return ends
