"""Texts for pages are as long as what keeps them can take."""

from hypothesis import given
from hypothesis import strategies as st

from diffusion.presentation.markdown import MOST, REST, fit_description

HEAD = "# fid 12\n\n| figure | this model |\n| --- | --- |\n| fid | 12 |\n\n"
DECISION = "## Decision\n\nChampion: the first version.\n\n"


def test_a_card_that_fits_is_left_alone() -> None:
    card = HEAD + DECISION + "x" * (MOST - len(HEAD + DECISION))
    assert fit_description(card) == card


def test_of_a_card_that_is_too_long_the_last_sections_go() -> None:
    card = f"{HEAD}{DECISION}## Use\n\n{'class, ' * 300}\n\n## Data\n\n{'licence ' * 400}\n\n## Lineage\n\nabc\n"
    fitted = fit_description(card)
    assert fitted == card[: card.index("## Data")] + REST
    assert fit_description(fitted.replace("the first version.", "better. " * 400)).startswith(HEAD + "## Decision")


@given(st.lists(st.text(max_size=3000), min_size=1, max_size=6))
def test_it_always_fits_and_says_once_that_there_is_more(sections: list[str]) -> None:
    card = "".join(f"## {section}\n" for section in sections)
    fitted = fit_description(fit_description(card))
    assert len(fitted) <= MOST
    assert fitted == fit_description(card)
