"""The examples for Kubernetes and SkyPilot name what there is."""

import importlib
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from fewstep.cli.main import app as program
from fewstep.serve.fleet import FleetSettings, app
from fewstep.serve.settings import read_settings

pytest.importorskip("ray")

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "examples" / "cluster"


def test_files_for_clusters_name_the_application_and_its_arguments():
    service = yaml.safe_load((CLUSTER / "serve.rayservice.yaml").read_text(encoding="utf-8"))
    (named,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    module, _, name = named["import_path"].partition(":")
    assert getattr(importlib.import_module(module), name) is app
    fleet = read_settings(FleetSettings, named["args"])
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert workers["maxReplicas"] == fleet.most
    (container,) = workers["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert (float(limits["nvidia.com/gpu"]), float(limits["cpu"])) == (fleet.gpus, fleet.cpus)
    mounted = [each["mountPath"] for each in container["volumeMounts"]]
    assert all(any(path.startswith(each) for each in mounted) for path in (fleet.model, fleet.api_keys))
    assert f"ray=={service['spec']['rayClusterConfig']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()


def test_the_file_for_skypilot_runs_the_command():
    service = yaml.safe_load((CLUSTER / "serve.sky.yaml").read_text(encoding="utf-8"))
    words = shlex.split(service["run"].replace("$SKYPILOT_NUM_GPUS_PER_NODE", "2").replace("$MODEL", "micro"))
    assert words[:2] == [".venv/bin/fewstep", "serve"]
    command = typer.main.get_command(program).commands["serve"]
    options = command.make_context("serve", words[2:]).params
    assert (options["replicas"], options["host"]) == (2, "0.0.0.0")
    assert options["port"] == service["resources"]["ports"]
    assert service["service"]["readiness_probe"]["path"] == "/ready"
    assert options["api_keys"] in service["file_mounts"]
