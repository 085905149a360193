"""`make up` and the literal commands of the README, typed as a user types them, against the real servers it starts."""

from __future__ import annotations

import base64
import fcntl
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from flows.plugins.deployment import name_position
from tests.conftest import PATIENCE, TINY, free_port
from tests.faults.flow_runs import FlowRun, flow_process, process
from tests.processes import family, signal_all, wait_until_ended
from tests.running import Training, stack_processes, wait_for_message
from tests.security.other_user import listening
from tests.stack import Project
from tests.typed import ROOT, blocks

pytestmark = pytest.mark.slow

# The stack stands behind a proxy that is not there: the product goes round it, a test's own client has to be told.
DIRECTLY = {"NO_PROXY": "127.0.0.1,localhost"}


def test_the_literal_command_trains_a_model(stack: Project, training: Training, received: list[dict[str, str]]) -> None:
    assert "train-diffusion/train-diffusion" in training.printed
    assert "Completed" in training.printed
    servers = stack.servers
    code = (
        "from mlflow import MlflowClient; c = MlflowClient(); e = c.get_experiment_by_name('train-diffusion').experiment_id;"
        "(r,) = c.search_runs([e], 'tags.`dataset.name` = \"generated-fields-and-water\"');"
        "print(r.info.status, r.data.tags['prefect.flow_run_url'], r.data.metrics['score/fid_eurosat']);"
        "print(c.get_model_version_by_alias('generated-fields-and-water-ddpm', 'champion').version)"
    )
    found = stack.shell(sys.executable, "-c", code, env=DIRECTLY | {"MLFLOW_DISABLE_TELEMETRY": "true", **servers})
    assert found.stdout.startswith("FINISHED http://127.0.0.1:"), found.stdout + found.stderr
    assert "It is the first version" in wait_for_message(received, "A new model is live")["body"]


@pytest.mark.last(1)  # what MLflow leaves beside a model that it loads is as open as the user's other files
def test_a_model_is_used_from_any_folder_by_the_words_of_the_pages(
    stack: Project, training: Training, tmp_path: Path
) -> None:
    """In a shell that knows this folder, and then only what the line of the page has told it."""
    line = 'eval "$(make env)"'
    assert f"`{line}`" in (ROOT / "README.md").read_text()
    (load,) = blocks("README.md", "Use a model", "python")
    (by_mlflow,) = blocks("docs/promotion.md", "Using a version", "python")
    (served,) = blocks("docs/promotion.md", "Using a version", "")
    (rolled_back,) = blocks("docs/promotion.md", "Roll back to an older version", "python")
    serve, ask = served.splitlines()
    port = str(free_port())
    script = f"""
{line}
cd {tmp_path}
python - <<'CODE'
{load}
CODE
python - <<'CODE'
{by_mlflow}
print(images.shape, more_typical.shape)
CODE
python -c "import mlflow; mlflow.MlflowClient().delete_registered_model_alias('eurosat-ddpm', 'champion')"
python - <<'CODE'
{rolled_back.replace('"3"', '"1"')}
print(mlflow.MlflowClient().get_model_version_by_alias("eurosat-ddpm", "champion").version, "is champion")
CODE
{serve} >serve.log 2>&1 &
trap "kill $!; pkill -P $!" EXIT
for try in $(seq 900); do {ask} >answer.json 2>/dev/null && grep -q predictions answer.json && break; sleep 1; done
cat answer.json
"""
    script = script.replace("eurosat-ddpm", "generated-fields-and-water-ddpm").replace("5001", port)
    done = stack.shell("bash", "-c", script, env={"MLFLOW_DISABLE_TELEMETRY": "true"})
    assert Image.open(tmp_path / "river.png").size == (16, 16), done.stdout + done.stderr
    assert "(8, 16, 16, 3) (8, 16, 16, 3)" in done.stdout, done.stdout + done.stderr
    assert "1 is champion" in done.stdout, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("{"), (tmp_path / "serve.log").read_text()[-3000:]
    answer = json.loads(last)
    assert Image.open(io.BytesIO(base64.b64decode(answer["predictions"][0]))).size == (16, 16)
    assert not list(tmp_path.glob("*.db")), "a database of nobody's was begun there"


def test_the_command_for_images_of_one_s_own_trains_on_them(own_images: str) -> None:
    assert "Completed" in own_images


def test_a_failure_is_told(stack: Project, received: list[dict[str, str]], mails: tuple[int, list[str]]) -> None:
    before = len(received)
    done = stack.shell("prefect", "deployment", "run", "train-diffusion", "-p", "source=/no/such.zip", "--watch")
    assert done.returncode == 1, done.stdout
    message = wait_for_message(received, "Failed", since=before)
    assert "There are no images at /no/such.zip" in message["body"]
    assert "/flow-run" in message["body"]
    deadline = time.monotonic() + PATIENCE
    while not any("There are no images at /no/such.zip" in mail for mail in mails[1]):
        assert time.monotonic() < deadline, mails[1]
        time.sleep(0.2)
    assert "To: owner@example.org" in mails[1][-1]


def test_nothing_is_written_to_the_home_folder(stack: Project) -> None:
    stack.shell("prefect", "deployment", "ls")
    left = {path.name for path in Path(stack.env["HOME"]).rglob("*")}
    assert not {name for name in left if "prefect" in name or "mlflow" in name}, left


def test_the_deployments_are_there_scheduled_and_refuse_to_overlap(stack: Project) -> None:
    code = """
import asyncio, json
from prefect import get_client
async def main():
    async with get_client() as client:
        for d in await client.read_deployments():
            schedule = [[s.schedule.cron, s.parameters] for s in d.schedules]
            limit = d.global_concurrency_limit.limit, d.concurrency_options.collision_strategy.value
            keys = list(d.parameter_openapi_schema["properties"])
            print(json.dumps([d.name, schedule, limit, keys]))
asyncio.run(main())
"""
    servers = stack.servers
    done = stack.shell(sys.executable, "-c", code, env=servers)
    found = {row[0]: row[1:] for row in map(json.loads, done.stdout.splitlines())}
    keys = [
        "preset",
        "overrides",
        "seed",
        "source",
        "source_options",
        "processes",
        "start_from",
        "nights",
        "skip_unchanged",
        "time_limit",
        "fid_margin",
        "bits_margin",
        "fid_bar",
    ]
    assert re.findall(r"cron: (.+)", (ROOT / "prefect.yaml").read_text()) == ["0 2 * * *", "0 12 * * 0"]
    nightly, weekly = re.findall(r"cron: (.+)", (stack.folder / "prefect.yaml").read_text())
    assert found == {
        "train-diffusion": [[[nightly, {}]], [1, "CANCEL_NEW"], keys],
        "clean-up": [
            [[weekly, {}]],
            [1, "CANCEL_NEW"],
            ["keep_runs", "keep_versions", "keep_champions", "dry_run"],
        ],
    }, done.stderr


def test_a_deployment_that_an_earlier_version_scheduled_is_deleted(stack: Project) -> None:
    code = """
import asyncio, sys
from prefect import get_client
async def main():
    async with get_client() as client:
        known = {d.name: d for d in await client.read_deployments()}
        if sys.argv[1:]:
            await client.create_deployment(known["train-diffusion"].flow_id, "nightly")
        print(sorted({d.name for d in await client.read_deployments()}))
asyncio.run(main())
"""
    env = stack.servers
    before = stack.shell(sys.executable, "-c", code, "make it", env=env)
    assert "nightly" in before.stdout, before.stderr
    done = stack.shell(sys.executable, "infra/automations.py", env=env)
    assert "deleted the deployment train-diffusion/nightly" in done.stdout, done.stderr
    assert stack.shell(sys.executable, "-c", code, env=env).stdout == "['clean-up', 'train-diffusion']\n"


STATES = """
import asyncio, sys
from prefect import get_client
from prefect.states import Cancelled, Crashed, Failed
async def main():
    async with get_client() as client:
        deployment = await client.read_deployment_by_name("train-diffusion/train-diffusion")
        async def go_through(*states, tags):
            run = await client.create_flow_run_from_deployment(deployment.id, state=states[0], tags=tags, name=sys.argv[1])
            for state in states[1:]:
                await client.set_flow_run_state(run.id, state, force=True)
        left_out = Cancelled(message="Deployment concurrency limit reached.")  # as Prefect does it
        await go_through(left_out, tags=["by hand"])
        await go_through(Cancelled(), tags=["auto-scheduled"])
        await go_through(left_out, tags=["auto-scheduled"])
        await go_through(Failed(message="once"), Crashed(message="twice"), tags=[])
        await go_through(Failed(message="the last"), tags=[])
asyncio.run(main())
"""


def headline(message: dict[str, str]) -> tuple[str, str]:
    return message["subject"], message["body"].splitlines()[0]


def test_a_night_left_out_is_told_and_a_failure_once(stack: Project, received: list[dict[str, str]]) -> None:
    before = len(received)
    done = stack.shell(sys.executable, "-c", STATES, "tried", env=stack.servers)
    assert done.returncode == 0, done.stderr
    for text in ("the last", "once", "A scheduled run was left out"):  # told side by side, in any order
        wait_for_message(received, text, since=before)
    # A set: Prefect may tell the same thing twice.
    told = {headline(one) for one in received[before:]} - {headline(one) for one in received[:before]}
    assert len(told) == 3, told
    assert sorted(told)[0][0] == "A scheduled run was left out"
    assert sorted(told)[1:] == [("tried: Failed", "once"), ("tried: Failed", "the last")]


AUTOMATIONS = """
import asyncio, json, sys
from prefect import get_client
from prefect.automations import Automation, AutomationCore
async def main():
    async with get_client() as client:
        known = {one.name: one for one in await client.read_automations()}
        told = known["train-diffusion: tell custom-webhook/tests of failures"]
        fields = told.model_dump(include={*AutomationCore.model_fields})
        if sys.argv[1:] == ["change"]:
            left = AutomationCore.model_validate(fields | {"name": told.name.replace("tests", "gone")})
            others = AutomationCore.model_validate(fields | {"name": "somebody else's"})
            for one in (left, others):
                await client.create_automation(one)
            fields["actions"][0]["subject"] = "an earlier version's"
        if sys.argv[1:]:
            changed = fields | {"enabled": sys.argv[1] == "enable"}
            await Automation(id=told.id, **changed).aupdate()
        print(json.dumps({name: [one.enabled, *(a.subject for a in one.actions if a.type == "send-notification")]
                          for name, one in known.items()}))
asyncio.run(main())
"""


def test_automations_follow_the_version_and_the_blocks_that_are_named(
    stack: Project, training: Training, received: list[dict[str, str]]
) -> None:
    named = stack.servers | {"TRAIN_DIFFUSION_NOTIFY": "custom-webhook/tests,smtp-mail/tests"}
    assert stack.shell(sys.executable, "infra/automations.py", env=named).stdout == "", "nothing was to be done"
    before = json.loads(stack.shell(sys.executable, "-c", AUTOMATIONS, "change", env=named).stdout)
    done = stack.shell(sys.executable, "infra/automations.py", env=named)
    assert sorted(done.stdout.splitlines()) == [
        "deleted 'train-diffusion: tell custom-webhook/gone of failures'",
        "renewed 'train-diffusion: tell custom-webhook/tests of failures'",
    ], done.stderr
    after = json.loads(stack.shell(sys.executable, "-c", AUTOMATIONS, "enable", env=named).stdout)
    assert after.pop("somebody else's")
    switched_off = after["train-diffusion: tell custom-webhook/tests of failures"]
    assert switched_off[0] is False, "whoever switched it off meant it"
    assert after == before | {"train-diffusion: tell custom-webhook/tests of failures": switched_off}


def test_other_names_are_resolved_left_alone_or_refused_with_help(stack: Project) -> None:
    inspected = stack.shell("prefect", "deployment", "inspect", "clean-up/clean-up")
    assert inspected.returncode == 0, inspected.stderr
    refused = stack.shell("prefect", "deployment", "run", "nothing-like-it")
    assert refused.returncode == 1
    assert "clean-up/clean-up, train-diffusion/train-diffusion" in refused.stderr
    for name in ("train-diffusion", "train-diffusion/train-diffusion"):
        wrong = stack.shell("prefect", "deployment", "run", name, "-p", "preset=demos", "--watch")
        assert wrong.returncode == 1
        assert "There is no preset 'demos': did you mean 'demo'?" in wrong.stderr
    module = stack.shell(sys.executable, "-m", "prefect", "deployment", "run", "nothing-like-it")
    assert "no deployment" in module.stderr
    elsewhere = stack.shell(
        "prefect", "deployment", "run", "train-diffusion", env={"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    )
    assert elsewhere.returncode == 1
    assert "does not answer" in elsewhere.stderr


def test_it_is_said_where_the_password_is_and_the_password_is_not(stack: Project) -> None:
    password = stack.servers["MLFLOW_TRACKING_PASSWORD"]
    assert str(stack.folder / "var/stack/password") in stack.printed
    assert password not in stack.printed, "in a pipe it would stay"
    assert oct((stack.folder / "var/stack/servers.json").stat().st_mode & 0o777) == "0o600"
    for log in (stack.folder / "var/stack").glob("*.log"):
        assert password not in log.read_text(errors="replace")


EDIT = """
import asyncio
from prefect import get_client
from prefect.client.schemas.schedules import CronSchedule
async def main():
    async with get_client() as client:
        one = await client.read_deployment_by_name("train-diffusion/train-diffusion")
        (schedule,) = one.schedules
        edited = CronSchedule(cron="0 4 * * *", timezone="Europe/Paris")
        await client.update_deployment_schedule(one.id, schedule.id, active=False, schedule=edited)
asyncio.run(main())
"""


@pytest.mark.last(1)
def test_up_again_starts_nothing_anew_that_is_as_asked_and_nothing_under_a_run(
    stack: Project, training: Training
) -> None:
    servers = stack.servers
    ports = {
        variable: servers[address].removesuffix("/api").rpartition(":")[2]
        for variable, address in (("PREFECT_PORT", "PREFECT_API_URL"), ("MLFLOW_PORT", "MLFLOW_TRACKING_URI"))
    }
    up = (sys.executable, "infra/stack.py", "up")
    before = {process.pid for process in stack_processes(stack)}
    edited = stack.shell(sys.executable, "-c", EDIT, env=servers)
    assert edited.returncode == 0, edited.stderr
    again = stack.shell(*up, env=ports)
    assert again.returncode == 0, again.stderr
    assert "nothing is started anew" in again.stdout
    assert "The schedule nightly of train-diffusion, edited to '0 4 * * *' Europe/Paris, goes back" in again.stdout
    paused = stack.shell("prefect", "deployment", "schedule", "ls", "train-diffusion/train-diffusion")
    assert "False" in paused.stdout, "a pause stays"
    assert f"{servers['MLFLOW_TRACKING_URI']}/#/experiments/1/runs?viewStateShareKey=train-diffusion" in again.stdout
    assert {process.pid for process in stack_processes(stack)} == before

    with (stack.folder / "var/stack/changing.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(b"1234")
        lock.flush()
        second = subprocess.Popen(
            [*up],
            cwd=stack.folder,
            env=stack.env | ports | {"TRAIN_DIFFUSION_NOTIFY": "custom-webhook/nobody"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert second.stdout is not None
        said = second.stdout.readline()
        assert "another command starts or stops the servers: waiting" in said
        assert said.endswith("kill 1234)\n"), said
    said = second.communicate()[0]
    assert second.returncode == 0, said
    assert "nothing is started anew" in said
    assert "'custom-webhook/nobody', which Prefect does not have: nobody is told by it" in said
    assert {process.pid for process in stack_processes(stack)} == before, "a misspelt block ends nothing"

    # A setting of the worker's differs: it would have to start anew, and end what it runs.
    # As many steps as are all told as they are made: longer trainings tell one in many.
    run = FlowRun.by_hand(stack, TINY | {"data.images": 16 * 1999, "evaluation.every_images": 16 * 1999})
    run.wait_for_step(1, run.id)
    ranks = [one for one in family(flow_process(stack)) if "diffusion.training.job" in " ".join(one.cmdline())]
    assert ranks
    signal_all(ranks, signal.SIGSTOP)  # under way all the same, and the cores are free for what is looked at
    try:
        refused = stack.shell(*up, env=ports | {"TRAIN_DIFFUSION_DETERMINISTIC": "true"})
        assert refused.returncode != 0
        assert "A flow run is under way, and would end: what it runs on has to start anew" in refused.stderr
        assert {process.pid for process in stack_processes(stack)} == before
        assert stack.shell("prefect", "flow-run", "cancel", run.id).returncode == 0
    finally:
        signal_all(ranks, signal.SIGCONT)
    run.wait_for(lambda: run.state()[0] == "CANCELLED")  # it may be called crashed before
    run.wait_for(lambda: not process(stack, "worker").children())
    cleaned = stack.stack("clean")
    assert " MB freed: copies of shards" in cleaned.stdout, cleaned.stderr
    assert list((stack.folder / "var/store/checkpoints").rglob("*.safetensors"))
    assert not (stack.folder / "var/shards").exists()


REAPED_BY_NOBODY = """
import subprocess, sys, time
import psutil
sys.path.insert(0, "infra")
import processes
child = subprocess.Popen(["true"])
while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
    time.sleep(0.01)
print(processes.runs(psutil.Process(child.pid)), processes.runs(psutil.Process()))
"""


def test_a_process_that_nobody_reaps_is_not_waited_for(stack: Project) -> None:
    done = stack.shell(sys.executable, "-c", REAPED_BY_NOBODY)
    assert done.stdout == "False True\n", done.stderr


STARTED_AGAIN = """
import os, sys
from pathlib import Path
sys.path.insert(0, "infra")
import processes
processes.STACK = Path(sys.argv[1])
processes.start("it", ["true"], dict(os.environ))
before = (processes.STACK / "it.pid").read_text()
with (processes.STACK / "it.pid").open() as looked_at:
    processes.start("it", ["true"], dict(os.environ))
    print(looked_at.read() == before != (processes.STACK / "it.pid").read_text())
"""


def test_who_looks_where_a_process_is_while_it_is_started_again_reads_a_whole_answer(
    stack: Project, tmp_path: Path
) -> None:
    done = stack.shell(sys.executable, "-c", STARTED_AGAIN, str(tmp_path))
    assert done.stdout == "True\n", done.stdout + done.stderr


@pytest.mark.last(2)
def test_down_stops_all_of_it_and_only_it_and_nobody_else_is_told_the_password(stack: Project) -> None:
    made = stack.shell(sys.executable, "infra/prefect_profile.py")
    assert made.returncode == 0, made.stderr
    servers, home = stack.servers, Path(stack.env["HOME"])
    roots = stack_processes(stack)
    processes = [process for root in roots for process in family(root)]
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        assert stack.stack("down").returncode == 0
        assert wait_until_ended(processes, time.monotonic() + PATIENCE) == []
        assert bystander.poll() is None
    finally:
        bystander.kill()
    assert "not running" in stack.stack("status").stdout
    # The profile's address goes with the servers.
    assert "PREFECT_API" not in (home / ".prefect" / "profiles.toml").read_text()
    ports = [str(urlsplit(servers[name]).port) for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")]
    with listening(ports[0]) as told, listening(ports[1]) as told_too:
        for folder in (stack.folder, home):
            gone = stack.shell("prefect", "deployment", "run", "train-diffusion", folder=folder)
            assert gone.returncode != 0, gone.stdout
    assert (told, told_too) == ([], []), "whoever listens there now"


@pytest.mark.parametrize(
    ("line", "position"),
    [
        ("prefect deployment run train-diffusion", 3),
        ("prefect deployment run -p preset=demo --watch train-diffusion", 6),
        ("/x/bin/prefect --profile other deployments run --param=a=b train-diffusion --tag x", 6),
        ("prefect deployment run clean-up/clean-up", 3),
        ("prefect deployment run --id 123", None),
        ("prefect deployment run --help", None),
        ("prefect deployment ls", None),
        ("prefect flow-run ls", None),
        ("python script.py deployment run x", None),
        ("pytest deployment run x", None),
    ],
)
def test_only_the_name_of_deployment_run_is_looked_at(line: str, position: int | None) -> None:
    assert name_position(line.split()) == position
