"""The scripts in launch/: complete, and their processes find each other."""

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from lact_jax.distributed import DistributedConfig, recognise

LAUNCH = Path(__file__).parents[1] / "launch"
SLURM = LAUNCH / "slurm.sh"


def jobset() -> tuple[dict, dict]:
    """(Service, JobSet)"""
    service, job = yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text())
    return service, job


def workers(job: dict) -> dict:
    (replicated,) = job["spec"]["replicatedJobs"]
    return replicated


def test_the_pods_of_the_jobset_find_the_first_one():
    service, job = jobset()
    name, subdomain = job["metadata"]["name"], job["spec"]["network"]["subdomain"]
    assert service["spec"]["clusterIP"] == "None" and service["metadata"]["name"] == subdomain
    assert service["spec"]["selector"] == {"jobset.sigs.k8s.io/jobset-name": name}
    assert job["spec"]["network"]["enableDNSHostnames"] is True
    replicated = workers(job)
    batch = replicated["template"]["spec"]
    pod = batch["template"]["spec"]
    assert pod["subdomain"] == subdomain
    (container,) = pod["containers"]
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    pods = batch["parallelism"]
    assert batch["completions"] == pods and batch["completionMode"] == "Indexed"
    port = service["spec"]["ports"][0]["port"]
    assert container["ports"][0]["containerPort"] == port
    for index in range(pods):  # Kubernetes itself adds the last variable
        found = recognise(DistributedConfig(), env | {"JOB_COMPLETION_INDEX": str(index)})
        assert found.coordinator == f"{name}-{replicated['name']}-0-0.{subdomain}:{port}"
        assert (found.num_processes, found.process_id, found.device_ids) == (pods, index, ())


def test_the_jobset_has_gpus_a_shared_volume_and_is_restarted_as_a_whole():
    _, job = jobset()
    batch = workers(job)["template"]["spec"]
    pod = batch["template"]["spec"]
    (container,) = pod["containers"]
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == 8
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounted) == set(volumes)
    assert "persistentVolumeClaim" in volumes["shared"] and mounted["shared"] == "/shared"
    workdir = next(x for x in container["args"] if x.startswith("--workdir="))
    assert workdir.startswith("--workdir=/shared/")
    assert mounted["memory"] == "/dev/shm"
    assert job["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert batch["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 60
    size = next(x for x in container["args"] if x.startswith("--config.data.batch_size="))
    assert int(size.split("=")[1]) % (8 * batch["parallelism"]) == 0


def test_slurm_runs_one_process_a_node_with_all_its_gpus():
    lines = re.findall(r"^#SBATCH --(\S+)$", SLURM.read_text(), re.MULTILINE)
    options = dict(line.split("=", 1) if "=" in line else (line, "") for line in lines)
    assert options["ntasks-per-node"] == "1" and options["gpus-per-node"] == "8"
    assert "requeue" in options and options["signal"].startswith("B:USR1@")
    told = {  # what srun tells the sixth process of such a step
        "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "node[01-08]", "SLURM_STEP_NUM_NODES": "8",
        "SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "0",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
    }  # fmt: skip
    found = recognise(DistributedConfig(), told)
    assert (found.method, found.num_processes, found.process_id) == ("slurm", 8, 5)
    assert found.device_ids == ()  # all, and not only the one that has the process's local number


FAKES = {
    "srun": """echo "srun $*"
        sleep 60 >/dev/null & trap 'kill $!; exit {ended}' TERM
        echo ready; wait""",
    "scontrol": 'echo "scontrol $*"',
}


@pytest.mark.parametrize(("ended", "requeued"), [(143, True), (0, False)])
def test_a_slurm_job_whose_time_is_up_is_stopped_and_put_back_unless_it_is_done(
    tmp_path, ended, requeued
):
    for name, body in FAKES.items():
        file = tmp_path / name
        file.write_text("#!/bin/bash\n" + body.format(ended=ended) + "\n")
        file.chmod(0o755)
    script = subprocess.Popen(
        ["bash", SLURM, "--config=configs/tiny.py", "--workdir=runs/a b"],
        env=os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node01", "SLURM_SUBMIT_DIR": str(tmp_path), "PYTHON": "python3",
        },
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    started = shlex.split(script.stdout.readline())
    assert started[-6:-3] == ["python3", "-u", "train.py"]
    assert started[-3:] == ["--config=configs/tiny.py", "--workdir=runs/a", "b"]  # of echo
    assert script.stdout.readline() == "ready\n"
    script.send_signal(signal.SIGUSR1)
    output = script.stdout.read()
    assert script.wait() == ended
    assert ("scontrol requeue 4711" in output) is requeued
