"""What runs a node in containers: checked against Kubernetes' schemas, the command line, and the rules of Akash's files."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from node.service.config import NodeConfig
from tallystick.cli.commands import app

ROOT = Path(__file__).parents[2]
PACKAGING = ROOT / "node" / "packaging"
IMAGES = [ROOT / folder / "packaging" / "Dockerfile" for folder in ("coordinator", "node", "tallystick")]


def _compose() -> Any:
    return yaml.safe_load((PACKAGING / "docker-compose.yml").read_text())["services"]


def _kubernetes() -> Any:
    return yaml.safe_load((PACKAGING / "kubernetes.yaml").read_text())


def _akash() -> Any:
    return yaml.safe_load((PACKAGING / "akash.yaml").read_text())


def _pod() -> Any:
    return _kubernetes()["spec"]["template"]["spec"]


def _environments() -> dict[str, dict[str, str]]:
    compose = _compose()["node"]["environment"]
    containers = {container["name"]: container for container in _pod()["containers"]}
    return {
        "compose": {name: re.sub(r"\$\{(\w+):[^}]*\}", r"\1", value) for name, value in compose.items()},
        "kubernetes": {entry["name"]: entry["value"] for entry in containers["node"]["env"]},
        "akash": dict(entry.split("=", 1) for entry in _akash()["services"]["node"]["env"]),
    }


@pytest.mark.parametrize("place", ["compose", "kubernetes", "akash"])
def test_the_first_start_is_a_command_that_there_is(place: str) -> None:
    """`tally node init` has the options, the engine's URL leads to the engine beside it, and all variables are settings."""
    given = _environments()[place]
    command: Any = typer.main.get_command(app)
    for name in ("node", "init"):
        command = command.get_command(None, name)
    options = command.make_context("init", ["--yes", *shlex.split(given["NODE_INIT"])]).params
    host = "127.0.0.1" if place == "kubernetes" else "vllm"
    assert options["engine"] == [f"http://{host}:8000/v1"]
    assert options["coordinator_url"]
    assert options["rpc"]
    settings = {f"TALLY_NODE_{name.upper()}" for name in NodeConfig.__dataclass_fields__}
    assert {name for name in given if name.startswith("TALLY_NODE_")} <= settings


def test_the_pod_meets_the_schema_of_kubernetes() -> None:
    """It is valid, mounts only volumes that it has, and can read the password."""
    workload = _kubernetes()
    kubernetes_validate.validate(workload, "1.31", strict=True)
    pod = _pod()
    volumes = {volume["name"] for volume in pod["volumes"]}
    volumes |= {claim["metadata"]["name"] for claim in workload["spec"]["volumeClaimTemplates"]}
    assert {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]} == volumes
    assert pod["securityContext"]["fsGroup"] == 10001
    assert "UID 10001" in _user(PACKAGING / "Dockerfile")


def _user(image: Path) -> str:
    match = re.search(r"^USER (\d+)$", image.read_text(), re.MULTILINE)
    return f"UID {match[1]}" if match else ""


def test_one_node_for_each_wallet() -> None:
    """No file starts a second node with the same wallet, not even while the first one stops."""
    workload = _kubernetes()
    assert (workload["kind"], workload["spec"]["replicas"]) == ("StatefulSet", 1)
    assert {count["count"] for service in _akash()["deployment"].values() for count in service.values()} == {1}
    assert "deploy" not in _compose()["node"]


def test_what_the_node_keeps_is_on_a_volume() -> None:
    """The wallet and the receipts outlive a container at all places."""
    home = "/var/lib/tallystick"
    assert f"state:{home}" in _compose()["node"]["volumes"]
    assert {"name": "state", "mountPath": home} in _pod()["containers"][1]["volumeMounts"]
    akash = _akash()
    assert akash["services"]["node"]["params"]["storage"]["state"]["mount"] == home
    (kept,) = (volume for volume in akash["profiles"]["compute"]["node"]["resources"]["storage"] if volume.get("name") == "state")
    assert kept["attributes"]["persistent"] is True
    assert kept["attributes"]["class"] != "ram"


def test_the_file_for_akash_is_whole() -> None:
    """Its parts refer to each other, and the engine is open to the node alone. One port must be open to all; it is the node's."""
    akash = _akash()
    services, profiles = akash["services"], akash["profiles"]
    assert akash["version"] == "2.0"
    assert services.keys() == akash["deployment"].keys() == profiles["compute"].keys()
    for name, service in services.items():
        ((place, placed),) = akash["deployment"][name].items()
        assert placed["profile"] in profiles["compute"]
        assert placed["profile"] in profiles["placement"][place]["pricing"]
        volumes = {volume.get("name") for volume in profiles["compute"][name]["resources"]["storage"]} - {None}
        assert set(service["params"]["storage"]) == volumes
        assert all(re.fullmatch(r"\w+=[^\n]+", entry) for entry in service["env"])
    assert services["vllm"]["expose"] == [{"port": 8000, "to": [{"service": "node"}]}]
    assert [to for port in services["node"]["expose"] for to in port["to"]] == [{"global": True}]
    assert NodeConfig.__dataclass_fields__["metrics_host"].default == "127.0.0.1"


def test_the_images_are_built_alike() -> None:
    """The same stage installs the same packages by their hashes, and none of them runs as root."""
    stages = {re.search(r"FROM python.*?(?=\nFROM)", image.read_text(), re.DOTALL)[0] for image in IMAGES}  # type: ignore[index]
    assert len(stages) == 1
    assert "--require-hashes" in stages.pop()
    assert {_user(image) for image in IMAGES} == {"UID 10001"}


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """A machine whose `tally` writes its arguments down, and makes the config that `node init` is to write."""
    program = tmp_path / "bin" / "tally"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@" >>"$CALLS"\n[ "$2" != init ] || touch "$TALLYSTICK_HOME/node.toml"\n')
    program.chmod(0o755)
    return {
        "PATH": f"{program.parent}:/usr/bin:/bin",
        "TALLYSTICK_HOME": str(tmp_path),
        "CALLS": str(tmp_path / "calls"),
    }


def _start(machine: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PACKAGING / "start", *arguments], env=machine, capture_output=True, text=True, check=False, timeout=120
    )


def test_the_entry_point(machine: dict[str, str], tmp_path: Path) -> None:
    """The first start makes the config, later ones keep it, and `status` asks the running node."""
    config = tmp_path / "node.toml"
    failed = _start(machine)
    assert failed.returncode != 0
    assert "NODE_INIT: name the engine and the market" in failed.stderr
    for _ in range(2):
        assert _start(machine | {"NODE_INIT": "--engine http://vllm:8000/v1 --slots *"}).returncode == 0
    assert _start(machine, "status").returncode == 0
    run = f"node run --config {config} --wallet node"
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"node init --yes --wallet node --out {config} --engine http://vllm:8000/v1 --slots *",
        run,
        run,
        f"node status --config {config} --json",
    ]
