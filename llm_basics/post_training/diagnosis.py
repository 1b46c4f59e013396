"""Diagnoses of failing reinforcement learning from rollouts, as text."""

from collections import deque
from collections.abc import Sequence

from llm_basics.post_training import rollouts

# number of steps over which findings are averaged, and after which a finding is repeated
WINDOW, REPEATED_AFTER = 20, 100

# thresholds of findings: share of groups with equal rewards, with equal responses, and of truncated responses
FLAT, IDENTICAL, CUT = 0.9, 0.5, 0.3

# contradicting changes between two windows: of the mean reward, and of the share of exact answers
RISE, FALL = 0.05, 0.05


class Diagnosis:
    """Analyzes the rollouts of each step; a finding is reported when it appears, and every 100 steps."""

    def __init__(self, group_size: int, max_new_tokens: int) -> None:
        self.group_size, self.max_new_tokens = group_size, max_new_tokens
        self.steps: deque[dict[str, float]] = deque(maxlen=2 * WINDOW)
        self.reported: dict[str, int] = {}

    def look(self, step: int, found: Sequence[rollouts.Rollout]) -> list[str]:
        """The findings to report after the rollouts of `step`."""
        size = self.group_size
        groups = [found[i : i + size] for i in range(0, len(found), size)]
        same = sum(len({tuple(r.ids) for r in group}) == 1 for group in groups) / len(groups)
        self.steps.append(rollouts.statistics(found, size) | {"identical": same})
        recent = list(self.steps)[-WINDOW:]
        mean = {name: sum(each[name] for each in recent) / len(recent) for name in recent[0]}
        findings = {}
        if mean["identical"] > IDENTICAL:
            findings["identical"] = (
                f"the {size} responses of a group are identical in {mean['identical']:.0%} of the groups: "
                "they cannot be compared; the policy is deterministic, so stop, or use other prompts"
            )
        elif mean["zero_variance"] > FLAT:
            n_flat = round(self.steps[-1]["zero_variance"] * len(groups))
            level = "right: use harder prompts" if mean["reward"] > 0.5 else "wrong: use easier ones"
            findings["flat"] = (
                f"all {size} responses of {n_flat} of {len(groups)} groups have the same reward: the "
                f"gradient is 0; responses are mostly {level}, or another reward"
            )
        if mean["cut_off"] > CUT:
            findings["cut"] = (
                f"{mean['cut_off']:.0%} of the responses are cut off at {self.max_new_tokens} tokens, and "
                "have the reward 0; raise --rl.max_new_tokens"
            )
        if len(self.steps) == self.steps.maxlen and (contradiction := self._contradiction(found)):
            findings["hacked"] = contradiction
        return [text for name, text in findings.items() if self._is_due(name, step)]

    def _contradiction(self, found: Sequence[rollouts.Rollout]) -> str:
        """The finding that rewards increase while exact answers decrease; "" if they do not."""
        steps = list(self.steps)
        before, after = steps[:WINDOW], steps[WINDOW:]
        rise, fall = (
            sum(each[name] for each in after) / WINDOW - sum(each[name] for each in before) / WINDOW
            for name in ("reward", "exact")
        )
        if rise < RISE or fall > -FALL:
            return ""
        rewarded = sorted((r for r in found if not r.is_exact), key=lambda r: -r.reward)[:3]
        listed = "; ".join(f"{r.text!r} for {r.case.question!r}" for r in rewarded)
        return (
            f"the reward rose by {rise:.2f} and the share of exact answers fell by {-fall:.2f} within "
            f"{2 * WINDOW} steps: wrong responses are rewarded, such as {listed}"
        )

    def _is_due(self, name: str, step: int) -> bool:
        last = self.reported.get(name)
        if last is not None and step - last < REPEATED_AFTER:
            return False
        self.reported[name] = step
        return True
