"""The steps of learning, each judged as a whole: passed, or which mistake was made.

uv run pytest tests/test_steps.py --mine mine.py                     your own pieces
uv run pytest tests/test_steps.py --adapters=PATH/tests/adapters.py  somebody's
"""

import pytest

from llm_basics.learn import judge, messages


@pytest.mark.parametrize("name", judge.STEPS)
def test_step(name, judged, how_to_go_on):
    verdict = judged(name)
    if verdict.status == "missing":
        pytest.skip(f"{', '.join(verdict.missing)}: not in the adapters file")
    if verdict.status != "passed":
        pytest.fail(messages.message(verdict, how_to_go_on(name)), pytrace=False)
