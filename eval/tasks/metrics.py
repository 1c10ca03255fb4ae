"""How an answer is graded: functions of an answer and the expected ones, from 0 (wrong) to 1 (right).

This file needs the standard library alone, because exported tasks carry a copy of it.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence

ARTICLES = ("a", "an", "the")
NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS["none"] = "0"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TOLERANCE = 0.05  # of the expected number
MOST_APART = 0.5  # share of the characters from which on ANLS is 0
FEWEST_ANSWERS = 4  # below, no answer could get the full vqa score


def normalise(answer: str) -> str:
    """Lower case, single spaces, no closing full stop: what two answers are compared by."""
    return " ".join(answer.lower().split()).rstrip(".")


def plain(text: str) -> str:
    """Words without case, punctuation and articles, with small numbers as digits; never empty for a text that is not.

    Signs and decimal points of numbers stay, and so do symbols such as % and $. "The  T-shirt's: two." is
    "t shirts 2".
    """
    kept = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    kept = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|['\u2019`]|\.(?!\d)", "", kept)  # 1,000; it's; a full stop
    kept = re.sub(r"(?<=\w)-|-(?!\d)", " ", kept)  # any hyphen but a sign
    kept = "".join(" " if unicodedata.category(c)[0] == "P" and c not in "%.-" else c for c in kept)
    words = [NUMBERS.get(word, word) for word in kept.split()]
    left = [word for word in words if word not in ARTICLES] or words
    return " ".join(left) or " ".join(text.lower().split())


def number(text: str) -> float | None:
    """The number that a text is, with thousands separators, and a percentage as its share; None for other texts."""
    text = text.strip().rstrip(".").rstrip()
    match = re.fullmatch(r"([-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)\s*(%?)", text)
    try:
        value = float(match[1].replace(",", "")) / (100 if match[2] else 1) if match else math.nan
    except ValueError:  # a sign or an exponent without digits
        return None
    return value if math.isfinite(value) else None


def distance(first: str, second: str) -> int:
    """Levenshtein's: characters to insert, delete or replace."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def exact(answer: str, expected: Sequence[str]) -> float:
    """Equal to an expected answer apart from case, spaces and a closing full stop."""
    return float(normalise(answer) in map(normalise, expected))


def normalized(answer: str, expected: Sequence[str]) -> float:
    """Equal to an expected answer apart from case, punctuation, articles, and numbers in words."""
    return float(plain(answer) in map(plain, expected))


def contains(answer: str, expected: Sequence[str]) -> float:
    """Has the words of an expected answer next to each other; for yes or no, the first of both in the answer counts."""
    words = plain(answer).split()
    said, first = f" {' '.join(words)} ", next((w for w in words if w in ("yes", "no")), None)
    wanted = [plain(e) for e in expected]
    return float(any(first == w if w in ("yes", "no") else f" {w} " in said for w in wanted))


def choice(answer: str, expected: Sequence[str]) -> float:
    """The letter of a right choice or its text; where a letter is given, it decides.

    A letter is one alone, in brackets, or before a text: "B", "(b)", "B. blue", "B) blue", "The answer is B."
    """
    letters = [e for e in expected if len(e) == 1 and e in LETTERS]
    texts = [e for e in expected if e not in letters]
    if exact(answer, texts):
        return 1.0
    if (letter := _letter(answer)) is not None:
        return float(letter in letters)
    return normalized(answer, [*texts, *(f"{letter} {text}" for letter in letters for text in texts)])


def names_a_choice(answer: str) -> bool:
    """Whether an answer names a letter, be it the right one or not."""
    return _letter(answer) is not None


def _letter(answer: str) -> str | None:
    """The letter that an answer names; "A blue ball" names none."""
    text = answer.strip().strip("*")
    alone = re.fullmatch(r"\(?([A-Za-z])\)?[.:,]?", text)
    before = re.match(r"\(([A-Za-z])\)|([A-Z])[.):](?!\w)", text)
    within = re.search(r"\b(?:answer|option|choice)(?: is)?:? *(?:option )?\(?([A-Z])\b(?!')", text, re.IGNORECASE)
    found = next((group for match in (alone, before) if match for group in match.groups() if group), None)
    if found is None and within and within[1].isupper():
        found = within[1]
    return found.upper() if found else None


def relaxed(answer: str, expected: Sequence[str]) -> float:
    """ChartQA's relaxed accuracy: a number within 5 % of the expected one; other answers as in `exact`."""
    said = number(answer)
    for text in expected:
        wanted = number(text)
        if said is not None and wanted is not None and abs(said - wanted) <= TOLERANCE * abs(wanted) * (1 + 1e-9):
            return 1.0
    return exact(answer, expected)


def vqa(answer: str, expected: Sequence[str]) -> float:
    """VQA's accuracy: a third for each person who agrees, at most 1; the mean over leaving each person out.

    Answers are compared as in `normalized`.
    """
    n, agreeing = len(expected), sum(plain(e) == plain(answer) for e in expected)
    left_out_agrees, left_out_differs = min(1.0, (agreeing - 1) / 3), min(1.0, agreeing / 3)
    return (agreeing * left_out_agrees + (n - agreeing) * left_out_differs) / n


def anls(answer: str, expected: Sequence[str]) -> float:
    """DocVQA's score: 1 less the edit distance as a share of the longer text; 0 where that share is a half or more."""
    said = " ".join(answer.lower().split())
    return max(_similar(said, " ".join(e.lower().split())) for e in expected)


def _similar(first: str, second: str) -> float:
    longest = max(len(first), len(second))
    apart = distance(first, second) / longest if longest else 0.0
    return 1 - apart if apart < MOST_APART else 0.0


Function = Callable[[str, list[str]], float]
METRICS: dict[str, Function] = {
    "exact": exact,
    "normalized": normalized,
    "contains": contains,
    "choice": choice,
    "relaxed": relaxed,
    "vqa": vqa,
    "anls": anls,
}
