"""The examples for clusters: their syntax, and that what they start is a command line that launch.py takes."""

import re
import shlex
import subprocess

import pytest
import yaml
from helpers import ROOT

import launch

SLURM = ROOT / "examples" / "slurm.sbatch"
JOBSET = list(yaml.safe_load_all((ROOT / "examples" / "jobset.yaml").read_text()))


def the(kind):
    (document,) = (document for document in JOBSET if document["kind"] == kind)
    return document


def container():
    (job,) = the("JobSet")["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (only,) = pod["containers"]
    return job, pod, only


def launch_arguments(text):
    (command,) = re.findall(r"python launch\.py .*", text)
    return shlex.split(command.replace('"$WORKDIR"', "runs/x"))[2:]


def test_the_slurm_script_is_bash_and_says_how_it_is_to_be_signalled():
    subprocess.run(["bash", "-n", SLURM], check=True)
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", SLURM.read_text(), re.MULTILINE))
    assert options["signal"].startswith("USR1@")  # sent to the steps of srun alone, which is where the trainer is
    assert int(options["ntasks-per-node"]) == int(options["gpus-per-node"])


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (1, 0, True), (138, 19, True), (143, 0, True), (134, 20, False)],
)
def test_the_slurm_script_queues_a_job_again_unless_it_is_complete_or_a_user_error(tmp_path, code, restarts, requeued):
    for name, text in {
        "srun": f'echo "$@" > started; exit {code}',
        "scontrol": 'echo "$@" > requeued',
        ".venv/bin/activate": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "TFDS_DATA_DIR": "x"}
    environment |= {"SLURM_RESTART_COUNT": str(restarts), "SLURM_CPUS_PER_TASK": "8"}
    done = subprocess.run(["bash", SLURM], cwd=tmp_path, env=environment)
    assert done.returncode == code
    started = (tmp_path / "started").read_text()
    assert started.startswith("--cpus-per-task=8 python ")  # srun does not take it from sbatch
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_the_jobset_fits_together():
    job, pod, only = container()
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] > 1
    account = the("ServiceAccount")["metadata"]["name"]
    assert pod["serviceAccountName"] == the("RoleBinding")["subjects"][0]["name"] == account
    assert the("RoleBinding")["roleRef"]["name"] == the("Role")["metadata"]["name"]
    readable = {resource for rule in the("Role")["rules"] for resource in rule["resources"]}
    assert {"pods", "jobs", "services"} <= readable  # what JAX asks the API for
    assert {mount["name"] for mount in only["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (volume,) = (mount["mountPath"] for mount in only["volumeMounts"])
    assert {variable["name"] for variable in only["env"]} == {"TFDS_DATA_DIR", "XDG_CACHE_HOME"}
    assert all(variable["value"].startswith(f"{volume}/") for variable in only["env"])  # a pod's own disk goes with it
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert pod["restartPolicy"] == "Never"
    (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": only["name"], "operator": "In", "values": [2]}


@pytest.mark.parametrize("example", ["slurm", "jobset"])
def test_what_the_examples_start_is_a_command_line_that_is_taken(example, monkeypatch):
    text = SLURM.read_text() if example == "slurm" else container()[2]["command"][-1]
    arguments = launch_arguments(text)
    assert {"--distributed", "--workdir", "--config"} <= set(arguments)
    parsed = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        launch.train_and_eval, "start_training", lambda flags, config, started: parsed.update(vars(flags))
    )
    launch.main(arguments)
    assert parsed["distributed"] is True
    assert "runs/" in parsed["workdir"]
