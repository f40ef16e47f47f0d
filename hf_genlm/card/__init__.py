"""The model card of a run, written from the files of its folder.

`write_card(run)` writes model/README.md, `render_card(run)` returns its text, and `check_card(recipe.card)`
refuses what the Hub would refuse.
"""

from hf_genlm.card.card import is_edited, render_card, write_card
from hf_genlm.card.front_matter import check_card

__all__ = ["check_card", "is_edited", "render_card", "write_card"]
