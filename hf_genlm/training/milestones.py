"""The model as it was after so many words of text: milestones/chck_1M, chck_2M ... of the run folder.

Each is a model folder that `from_pretrained` loads, whole or not there, and its name is a branch that the Hub
takes. Words are those between white space in the training text, as `str.split` has them. What of them a step
has seen follows from its tokens: as many words a token as in the whole text. So it is exact at the end of
every pass, and a mean within one.
"""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, TrainerCallback

from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.run_folder import RunFolder
from hf_genlm.training.budget import Budget
from hf_genlm.training.callbacks import Pace
from hf_genlm.training.processes import from_first

_MILLION = 10**6
_UNITS = {"": 1, "K": 10**3, "M": _MILLION, "B": 10**9}
# those of the BabyLM challenge: every million to ten, every ten to a hundred, every hundred to a thousand
SCHEDULES = {"babylm": tuple(n * unit * _MILLION for unit in (1, 10, 100) for n in range(1, 11))}


@dataclass(frozen=True)
class WordRate:
    """`words` of text for `tokens` that are predicted in it, as `Pace` counts them."""

    words: int
    tokens: int

    def words_in(self, tokens: int) -> int:
        """Words of text that have been seen with so many tokens."""
        return tokens * self.words // self.tokens


def read_milestones(stated: Sequence[str]) -> list[int]:
    """`training.milestone_words` as numbers of words, ascending.

    Raises:
        UserError: a word that is neither a number nor a schedule.
    """
    found: set[int] = set()
    for word in stated:
        number = re.fullmatch(r"([0-9]{1,15})([KMB]?)", word, flags=re.IGNORECASE | re.ASCII)
        if number is not None and int(number[1]) > 0:
            found.add(int(number[1]) * _UNITS[number[2].upper()])
        elif word in SCHEDULES:
            found.update(SCHEDULES[word])
        else:
            near = did_you_mean(word, SCHEDULES)
            raise UserError(f"training.milestone_words: {word!r} is no number such as 500K or 1M{near}")
    return sorted(found)


def name_of(words: int) -> str:
    """`chck_1M`, `chck_250K`, `chck_123`."""
    unit = next(unit for unit in ("M", "K", "") if words % _UNITS[unit] == 0)
    return f"chck_{words // _UNITS[unit]}{unit}"


class WordsCallback(TrainerCallback):
    """Calls `keep(model, words, step)` after the first step that has seen so many words, for each of `words`.

    Those that lie in the run folder, whole as they all are, are not written again, but in a second try, which
    takes away those of the first that lie ahead. A run by the clock leaves one out where writing the last
    took more time than is left.
    """

    def __init__(
        self,
        run: RunFolder,
        budget: Budget,
        pace: Pace,
        rate: WordRate,
        words: Sequence[int],
        keep: Callable[[PreTrainedModel, int, int], None],
        is_second_try: bool = False,
    ):
        self.run, self.budget, self.pace, self.rate, self.keep = run, budget, pace, rate, keep
        self.words, self.is_second_try = list(words), is_second_try
        self._took_s = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        seen = self.rate.words_in(self.pace.tokens(state.global_step))
        ahead = [words for words in self.words if words > seen]
        self.words = from_first(lambda: self._missing(ahead))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        seen = self.rate.words_in(self.pace.tokens(state.global_step))
        while self.words and self.words[0] <= seen:
            words = self.words.pop(0)
            left_s = None if self.budget.seconds is None else self.budget.seconds - self.budget.elapsed_s
            if left_s is not None and self._took_s > max(0.0, left_s):
                self.run.log("note", message=f"{name_of(words)} was not written: no time was left for it")
                continue
            control.should_log = True
            began = self.budget.elapsed_s
            self.keep(model, words, state.global_step)
            self.budget.agree()
            self._took_s = self.budget.elapsed_s - began

    def _missing(self, words: Sequence[int]) -> list[int]:
        folders = {count: self.run.milestones / name_of(count) for count in words}
        if self.is_second_try:
            for folder in folders.values():
                shutil.rmtree(folder, ignore_errors=True)
        return [count for count, folder in folders.items() if not folder.is_dir()]
