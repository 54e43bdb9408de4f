import re

from em_kernels.one_shot.config import DEFAULT_PROMPT
from em_kernels.one_shot.data.built_in import make_problems

# The arithmetic behind each template, found by words that occur in the template alone.
_SOLUTIONS = {
    "more. How many": lambda a, b: a + b,
    "of them away": lambda a, b: a - b,
    "in the evening": lambda a, b: a + b,
    "in each box": lambda a, b: a * b,
    "dollars each": lambda a, b: a * b,
    "equally among": lambda a, b: a // b,
}


def test_answers_are_right_and_every_template_occurs() -> None:
    seen = set()
    for problem in make_problems(200, seed=3):
        [words] = [words for words in _SOLUTIONS if words in problem.question]
        answer = _SOLUTIONS[words](*map(int, re.findall(r"\d+", problem.question)))
        assert problem.answers == (str(answer),)
        seen.add(words)
    assert seen == set(_SOLUTIONS)


def test_problems_follow_from_the_seed_and_are_different() -> None:
    problems = make_problems(200, seed=3)
    assert problems == make_problems(200, seed=3)
    assert problems != make_problems(200, seed=4)
    assert len({problem.question for problem in problems}) == 200


def test_problems_are_held_apart_from_the_training_prompt() -> None:
    without = make_problems(50, seed=0)
    prompt = re.sub(r"\d+", "7", without[0].question.upper().replace(" ", "\n"))
    problems = make_problems(50, seed=0, exclude=[prompt, DEFAULT_PROMPT])
    assert len(problems) == 50
    assert without[0] not in problems
    assert without[1:10] == problems[:9]
