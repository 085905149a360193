"""Parameters of a run are checked where they are typed."""

import inspect
import re
import shlex
from pathlib import Path

import pytest

from diffusion.errors import DataError, RecipeError
from flows.submission import check_parameters, parameters_of
from flows.train_diffusion import train_diffusion


def test_parameters_are_read_as_prefect_reads_them() -> None:
    words = ["-p", "preset=demo", "--watch", "--param=seed=3", "--params", '{"seed": 1, "nights": "new data"}', "-p"]
    assert parameters_of(words) == {"preset": "demo", "seed": 3, "nights": "new data", "": ""}
    assert parameters_of(["--params={", "-p", "source=a=b"]) == {"source": "a=b"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-p", "preset=dmo"], "There is no preset 'dmo': did you mean 'demo'"),
        (["-p", 'overrides={"network.widht": 3}'], r"did you mean 'network\.width'"),
        (["-p", 'overrides={"network.width": "wide"}'], r"network\.width: .*valid integer"),
        (["-p", "overrides=network.width=3"], "overrides is network.width=3: names and values are wanted"),
        (["-p", 'source_options={"siz": 3}'], "did you mean 'size'"),
        (["--params", '{"preset": "eurosatt"}'], "did you mean 'eurosat'"),
        (["-p", 'overrides={"seed": 5}'], "a parameter of the run"),
        (["-p", "preset=demo", "-p", 'overrides={"data.lanes": 32}'], "not a multiple"),
    ],
)
def test_what_is_wrong_is_said_with_the_nearest_name(words: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        check_parameters(words)


@pytest.mark.parametrize(
    "source", ["s3://key:secret@images/a-{00..02}.tar", "webdataset:https://me:secret@x.org/a.tar"]
)
def test_an_address_with_a_password_is_refused_before_it_is_a_parameter(source: str) -> None:
    with pytest.raises(DataError, match="user or password in it") as error:
        check_parameters(["-p", f"source={source}"])
    assert "secret" not in str(error.value)


def test_what_is_right_or_lies_on_the_worker_s_machine_passes(tmp_path: Path) -> None:
    check_parameters([])
    check_parameters(["-p", 'overrides={"data.lanes": 32}'])  # of eurosat, if the worker has a GPU
    check_parameters(["-p", "preset=demo", "-p", 'overrides={"network.width": 96}', "-p", "source=/data/images"])
    check_parameters(["-p", "source=s3://images/a-{00..02}.tar"])
    check_parameters(["-p", "preset=/only/there/mine.yaml", "-p", 'overrides={"network.width": 96}'])
    (tmp_path / "mine.yaml").write_text("data: {imags: 3}\n")
    with pytest.raises(RecipeError, match="did you mean"):
        check_parameters(["-p", f"preset={tmp_path / 'mine.yaml'}"])


PROJECT = Path(__file__).parents[2]
TYPED = re.compile(r"^prefect deployment run train-diffusion(?: .*\\\n)*.*$", re.MULTILINE)
COMMANDS = [
    command
    for page in (PROJECT / "README.md", *(PROJECT / "docs").glob("*.md"))
    for command in TYPED.findall(page.read_text())
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_run_that_a_page_shows_is_taken(command: str) -> None:
    words = shlex.split(command.replace("\\\n", " "))[4:]
    check_parameters(words)
    assert parameters_of(words).keys() <= inspect.signature(train_diffusion.fn).parameters.keys()


def test_the_runs_that_pages_show_are_found() -> None:
    assert len(COMMANDS) > 2
