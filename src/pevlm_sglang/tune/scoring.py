"""Is an answer right, and how far is it from full attention's?"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pevlm_sglang.tune.client import Token

_LEAD = re.compile(r"(?:the )?(?:correct |best )?(?:answer|option)(?: is)?[ :]+")
_OPTION = re.compile(r"\(([a-z])\)\s*(.*)|([a-z])(?:[).:]\s*(.*)|$)")
_MARKS = "*_`'\" "
_STRIPPED = _MARKS + ".,;:!?()[]{}"  # no sign, so that -5 is not 5


def is_right(given: str, expected: str) -> bool:
    """Normalised exact match.

    Equal but for case, white space, and punctuation at either end. Where the expected answer is an
    option of a multiple choice, ``B``, ``(B)``, ``B.`` or ``B. two cars``, an answer is right too
    if it begins with the same option in one of these forms, also after ``Answer:`` or ``The answer
    is``, or if it is the option's text.
    """
    if normalise(given) == normalise(expected):
        return True
    option, text = _option(expected)
    if option is None:
        return False
    given_option, _ = _option(given)
    if given_option is not None:
        return given_option == option
    return bool(text) and normalise(given) == normalise(text)


def normalise(text: str) -> str:
    return _spaced(text).strip(_STRIPPED) or _spaced(text)


def logprob_difference(full: Sequence[Token], other: Sequence[Token]) -> float | None:
    """Mean absolute difference of the log-probs of full attention's answer's tokens.

    Compared are the tokens before the first at which the answers differ, and that one, which the
    other answer's ``top`` may hold; if not, the least of ``top`` stands in for it, and the
    difference is too small rather than too large. What follows has another context in each answer,
    and is left out.

    Args:
        full, other: the answers' tokens; ``other`` with ``top``.

    Returns:
        natural logarithms; None where either answer is empty.
    """
    differences = []
    for token, beside in zip(full, other, strict=False):
        if token.text == beside.text:
            differences.append(abs(token.logprob - beside.logprob))
            continue
        there = beside.top.get(token.text, min(beside.top.values(), default=beside.logprob))
        differences.append(abs(token.logprob - there))
        break
    return sum(differences) / len(differences) if differences else None


def _spaced(text: str) -> str:
    return " ".join(text.casefold().split())


def _option(text: str) -> tuple[str | None, str]:
    """The letter of an option, if the text begins with one, and what follows it."""
    spaced = _spaced(text).strip(_MARKS)
    lead = _LEAD.match(spaced)
    match = _OPTION.match(spaced[lead.end() :] if lead else spaced)
    if match is None:
        return None, ""
    bracketed, bracketed_text, bare, bare_text = match.groups()
    return bracketed or bare, bracketed_text or bare_text or ""
