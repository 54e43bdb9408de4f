"""Arithmetic word problems with known answers, drawn from templates with a seed, to measure accuracy on."""

import random
import re
from collections.abc import Callable, Sequence

from em_kernels.one_shot.data.problems import Problem

_NAMES = ("Anna", "Ben", "Carla", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kofi", "Lena")
_THINGS = ("apples", "books", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "stickers", "tickets")


def _gain(name: str, things: str, a: int, b: int) -> Problem:
    return _problem(f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?", a + b)


def _loss(name: str, things: str, a: int, b: int) -> Problem:
    question = f"{name} has {a + b} {things} and gives {b} of them away. How many {things} does {name} have left?"
    return _problem(question, a)


def _sum(name: str, things: str, a: int, b: int) -> Problem:
    question = f"{name} finds {a} {things} in the morning and {b} in the evening. How many {things} is that in all?"
    return _problem(question, a + b)


def _groups(name: str, things: str, a: int, b: int) -> Problem:
    question = f"{name} fills {a} boxes with {b} {things} in each box. How many {things} are there in all?"
    return _problem(question, a * b)


def _price(name: str, things: str, a: int, b: int) -> Problem:
    return _problem(f"{name} buys {a} {things} for {b} dollars each. How many dollars does {name} pay?", a * b)


def _shares(name: str, things: str, a: int, b: int) -> Problem:
    question = f"{name} shares {a * b} {things} equally among {a} friends. How many {things} does each friend get?"
    return _problem(question, b)


def _problem(question: str, answer: int) -> Problem:
    return Problem(question, (str(answer),))


_TEMPLATES: tuple[Callable[[str, str, int, int], Problem], ...] = (_gain, _loss, _sum, _groups, _price, _shares)
# Of the problems that take one step with numbers of one digit, a model of 135M parameters solves a quarter.
_NUMBERS = (2, 9)


def make_problems(count: int, *, seed: int, exclude: Sequence[str] = ()) -> list[Problem]:
    """`count` different problems, the same for the same arguments, or all there are if there are fewer: 46,080.

    Args:
        count: the number of problems.
        seed: the seed of names, things and numbers.
        exclude: texts that no problem may equal, where texts that differ only in their numbers count as equal.
    """
    rng = random.Random(seed)
    excluded = {_without_numbers(text) for text in exclude}
    problems: dict[str, Problem] = {}
    all_there_are = len(_TEMPLATES) * len(_NAMES) * len(_THINGS) * (_NUMBERS[1] - _NUMBERS[0] + 1) ** 2
    # By chance, so many draws leave out a problem less than once in 10^15 times.
    for attempt in range(min(100 * count, 50 * all_there_are)):
        if len(problems) == count:
            break
        template = _TEMPLATES[attempt % len(_TEMPLATES)]
        problem = template(rng.choice(_NAMES), rng.choice(_THINGS), rng.randint(*_NUMBERS), rng.randint(*_NUMBERS))
        if problem.question not in problems and _without_numbers(problem.question) not in excluded:
            problems[problem.question] = problem
    return list(problems.values())


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+", "#", " ".join(text.split())).casefold()
