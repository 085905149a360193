"""How one model is scored as another recipe says: neither loses by what only the other can do."""

import pytest

from diffusion.errors import DataError, RecipeError
from diffusion.evaluation.protocol import evaluation_as, protocol
from diffusion.recipe import Recipe
from diffusion.recipe_files import load_recipe, with_evaluation
from tests.conftest import tiny_recipe

GUIDED = load_recipe("demo", {"evaluation.guidance": 2.0, "evaluation.guidance_interval": [0.3, 10]})
UNGUIDABLE = (
    load_recipe("demo", {"network.label_dropout": 0.0, "evaluation.guidance": 1.0}),
    load_recipe("demo", {"network.class_conditional": False, "evaluation.guidance": 1.0}),
)


@pytest.mark.parametrize("other", UNGUIDABLE)
def test_of_two_models_of_which_one_can_t_be_guided_each_draws_as_well_as_it_can(other: Recipe) -> None:
    assert evaluation_as(GUIDED, other).guidance == 1
    as_other = evaluation_as(other, GUIDED)
    assert (as_other.guidance, as_other.guidance_interval) == (2.0, (0.3, 10.0))
    assert as_other.model_copy(
        update={"guidance": 1.0, "guidance_interval": other.evaluation.guidance_interval}
    ) == other.evaluation.model_copy(update={"guidance": 1.0})
    assert protocol(other) != protocol(GUIDED)


def test_two_that_can_be_guided_are_scored_alike() -> None:
    other = load_recipe("demo", {"evaluation.guidance": 1.5})
    assert evaluation_as(other, GUIDED) == other.evaluation


def test_images_of_another_size_are_another_model_s() -> None:
    with pytest.raises(DataError, match="another size"):
        evaluation_as(tiny_recipe(), GUIDED)


def test_guidance_of_what_knows_no_classes_is_refused() -> None:
    with pytest.raises(RecipeError, match="this one knows none"):
        with_evaluation(UNGUIDABLE[1], {"guidance": "2"})
    assert with_evaluation(UNGUIDABLE[1], {"samples": "20"}).evaluation.samples == 20
