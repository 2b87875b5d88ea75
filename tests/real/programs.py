"""The programs: etcd, kube-apiserver and kube-controller-manager, and Jaeger, on the loopback with files of their own.

In: a directory that ``tools/real.py`` filled (SPANLOOM_REAL), and one for data. Out: ``ControlPlane`` and ``Jaeger``,
which are ready when entered. Never: a port that another host reaches, or a process that stays.
"""

from __future__ import annotations

import json
import os
import secrets
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.apiserver import make_certificates, write_volume
from tests.e2e.harness import Process, clean_environment, free_port, wait_until

Json = dict[str, Any]

START_SECONDS = 120.0
"""An API server takes some ten seconds here, and more on a machine that does other things as well."""
REQUEST_SECONDS = 30.0

NODE = "node-a"


def binary(name: str) -> Path:
    """One of the programs that were built."""
    directory = os.environ.get("SPANLOOM_REAL")
    assert directory, "SPANLOOM_REAL is not set: `make real` builds the programs and sets it"
    return Path(directory) / name


class RefusedError(AssertionError):
    """The API server refused a request of the test's own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class ControlPlane:
    """A control plane without nodes: nothing schedules pods or runs them, the test does both in its own way.

    ``create`` and the like act as the administrator. The controllers run but for those that look after nodes.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.host, self.port = "127.0.0.1", free_port()
        self._stack = ExitStack()
        self._etcd_port = free_port()
        self._admin_token = secrets.token_urlsafe(32)
        self._api: Process | None = None
        self._starts = 0
        self.ca_pem, self._certificate, self._key = make_certificates(directory)
        self._context = ssl.create_default_context(cadata=self.ca_pem)
        accounts = directory / "accounts.key"
        subprocess.run(
            ["openssl", "genrsa", "-out", str(accounts), "2048"], check=True, capture_output=True, timeout=60
        )
        (directory / "tokens.csv").write_text(f'{self._admin_token},admin,admin,"system:masters"\n')
        self.kubeconfig = directory / "kubeconfig"
        self.kubeconfig.write_text(json.dumps(self._kubeconfig()))

    def _kubeconfig(self) -> Json:
        cluster = {
            "server": f"https://{self.host}:{self.port}",
            "certificate-authority": str(self.directory / "ca.crt"),
        }
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "real", "cluster": cluster}],
            "users": [{"name": "admin", "user": {"token": self._admin_token}}],
            "contexts": [{"name": "real", "context": {"cluster": "real", "user": "admin"}}],
            "current-context": "real",
        }

    def __enter__(self) -> ControlPlane:
        try:
            self._start_etcd()
            self.start_api()
            self._start_controllers()
            self._create_node()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_api()
        self._stack.close()

    @property
    def environ(self) -> dict[str, str]:
        """The variables that the kubelet gives each container."""
        return {"KUBERNETES_SERVICE_HOST": self.host, "KUBERNETES_SERVICE_PORT": str(self.port)}

    def _start_etcd(self) -> None:
        peer = f"http://127.0.0.1:{free_port()}"
        client = f"http://127.0.0.1:{self._etcd_port}"
        arguments = [str(binary("etcd")), "--data-dir", str(self.directory / "etcd"), "--unsafe-no-fsync"]
        arguments += ["--listen-client-urls", client, "--advertise-client-urls", client]
        arguments += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        # The interval is what kubeadm sets.
        arguments += ["--initial-cluster", f"default={peer}", "--watch-progress-notify-interval", "5s"]
        process = self._stack.enter_context(Process(arguments, log=self.directory / "etcd.log"))
        process.wait_for_port(self._etcd_port)

    def start_api(self) -> None:
        """Start the API server, again after ``stop_api``, and wait until it is ready."""
        self._starts += 1
        accounts = str(self.directory / "accounts.key")
        options = {
            "etcd-servers": f"http://127.0.0.1:{self._etcd_port}",
            "bind-address": self.host,
            "advertise-address": self.host,
            "secure-port": self.port,
            "tls-cert-file": self._certificate,
            "tls-private-key-file": self._key,
            "token-auth-file": self.directory / "tokens.csv",
            "authorization-mode": "Node,RBAC",
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-key-file": accounts,
            "service-account-signing-key-file": accounts,
            "service-cluster-ip-range": "10.96.0.0/16",
            "endpoint-reconciler-type": "none",  # it refuses to advertise the loopback
            "allow-privileged": "true",
        }
        arguments = [binary("kube-apiserver"), *(f"--{key}={value}" for key, value in options.items())]
        self._api = Process(arguments, log=self.directory / f"apiserver-{self._starts}.log")
        wait_until(self._is_ready, self._last_words, START_SECONDS, 0.2)

    def stop_api(self) -> None:
        """End the API server at once, as a crash does: connections are cut."""
        if self._api is not None:
            self._api.popen.kill()
            self._api.popen.wait(10)
            self._api = None

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """The API server is at another port meanwhile, and afterwards knows nothing of the past.

        Whoever knows the one port only, such as an agent, finds nobody there.
        """
        self.stop_api()
        port, self.port = self.port, free_port()
        self.start_api()
        try:
            yield
        finally:
            self.stop_api()
            self.port = port
            self.compact()
            self.start_api()

    def _is_ready(self) -> bool:
        assert self._api is not None
        self._api.check_alive()
        try:
            return self._open("GET", "/readyz") == b"ok"
        except (OSError, RefusedError):
            return False

    def _last_words(self) -> str:
        return f"the API server is ready:\n{self._api.output()[-4000:] if self._api else ''}"

    def _start_controllers(self) -> None:
        options = {
            "kubeconfig": self.kubeconfig,
            "service-account-private-key-file": self.directory / "accounts.key",
            "root-ca-file": self.directory / "ca.crt",
            "leader-elect": "false",
            "bind-address": self.host,
            "secure-port": free_port(),
            # There is no kubelet whose silence could mean anything.
            "controllers": "*,-node-lifecycle-controller,-pod-garbage-collector-controller",
        }
        arguments = [binary("kube-controller-manager"), *(f"--{key}={value}" for key, value in options.items())]
        process = self._stack.enter_context(Process(arguments, log=self.directory / "controllers.log"))

        def made() -> bool:
            process.check_alive()
            return self.find("/api/v1/namespaces/default/serviceaccounts/default") is not None

        wait_until(made, lambda: f"the controllers run:\n{process.output()[-4000:]}", START_SECONDS, 0.2)

    def _create_node(self) -> None:
        labels = {"kubernetes.io/os": "linux", "kubernetes.io/hostname": NODE}
        self.create("/api/v1/nodes", {"kind": "Node", "apiVersion": "v1", "metadata": {"name": NODE, "labels": labels}})
        condition = {"type": "Ready", "status": "True", "reason": "KubeletReady"}
        allocatable = {"cpu": "8", "memory": "32Gi", "pods": "250"}
        status = {"conditions": [condition], "allocatable": allocatable, "capacity": allocatable}
        self.patch(f"/api/v1/nodes/{NODE}/status", {"status": status})
        # Admission taints each new node until the controller that does not run here sees it ready.
        self.patch(f"/api/v1/nodes/{NODE}", {"spec": {"taints": []}})

    # -- requests as the administrator

    def _open(self, method: str, path: str, body: Json | None = None, kind: str = "application/json") -> bytes:
        return self._exchange(method, path, body, kind)[0]

    def _exchange(self, method: str, path: str, body: Json | None, kind: str) -> tuple[bytes, list[str]]:
        """The answer and the server's warnings."""
        request = urllib.request.Request(
            f"https://{self.host}:{self.port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self._admin_token}", "Content-Type": kind},
        )
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self._context)
        )
        try:
            with opener.open(request, timeout=REQUEST_SECONDS) as response:
                return response.read(), response.headers.get_all("Warning") or []
        except urllib.error.HTTPError as error:
            with error:
                raise RefusedError(error.code, error.read().decode("utf-8", "replace")[:2000]) from None

    def get(self, path: str) -> Json:
        return json.loads(self._open("GET", path))

    def find(self, path: str) -> Json | None:
        """The object, None when there is none, or when the server is not ready to say so (429)."""
        try:
            return self.get(path)
        except RefusedError as error:
            if error.status in (404, 429):
                return None
            raise

    def items(self, path: str) -> list[Json]:
        return self.get(path)["items"]

    def create(self, path: str, thing: Json) -> Json:
        return json.loads(self._open("POST", path, thing))

    def try_strictly(self, thing: Json) -> list[str]:
        """Have an object validated and admitted, unknown fields refused, and not stored; the server's warnings."""
        version = thing["apiVersion"]
        prefix = f"/apis/{version}" if "/" in version else f"/api/{version}"
        [resource] = [
            one for one in self.get(prefix)["resources"] if one["kind"] == thing["kind"] and "/" not in one["name"]
        ]
        namespace = f"/namespaces/{thing['metadata']['namespace']}" if resource["namespaced"] else ""
        path = f"{prefix}{namespace}/{resource['name']}?dryRun=All&fieldValidation=Strict"
        return self._exchange("POST", path, thing, "application/json")[1]

    def patch(self, path: str, change: Mapping[str, Any]) -> Json:
        return json.loads(self._open("PATCH", path, dict(change), "application/merge-patch+json"))

    def delete(self, path: str, grace_seconds: int = 0) -> None:
        self._open("DELETE", f"{path}?gracePeriodSeconds={grace_seconds}")

    def create_namespace(self, name: str, level: str = "privileged") -> None:
        """A namespace at this level of Pod Security, with the objects in it that controllers make."""
        labels = {"pod-security.kubernetes.io/enforce": level}
        self.create("/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})
        self.wait_for_account(name, "default")

    def wait_for_account(self, namespace: str, name: str) -> None:
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}"
        wait_until(lambda: self.find(path), f"the service account {namespace}/{name}", START_SECONDS, 0.1)

    def write_account(self, directory: Path, namespace: str, account: str, pod: Json) -> Path:
        """Mount the account as the kubelet does: a token that is bound to the pod, in a projected volume."""
        bound = {"kind": "Pod", "apiVersion": "v1", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
        request = {"spec": {"expirationSeconds": 3607, "boundObjectRef": bound}}
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        token = self.create(path, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", **request})
        write_volume(directory, {"token": token["status"]["token"], "ca.crt": self.ca_pem, "namespace": namespace})
        return directory

    def compact(self) -> None:
        """Have etcd forget all but the present: what the API server does every five minutes."""
        body = json.dumps({"key": "AA==", "range_end": "AA=="}).encode()
        revision = json.loads(self._etcd("kv/range", body))["header"]["revision"]
        self._etcd("kv/compaction", json.dumps({"revision": revision, "physical": True}).encode())

    def _etcd(self, path: str, body: bytes) -> bytes:
        request = urllib.request.Request(f"http://127.0.0.1:{self._etcd_port}/v3/{path}", data=body)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=REQUEST_SECONDS) as response:
            return response.read()


class Jaeger:
    """The all-in-one with its built-in configuration, on the ports that it chooses itself. A context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: Process | None = None
        self.endpoint = "http://127.0.0.1:4317"

    def __enter__(self) -> Jaeger:
        environment = clean_environment(JAEGER_LISTEN_HOST="127.0.0.1")
        self._process = Process([binary("jaeger")], log=self._directory / "jaeger.log", env=environment)
        try:
            for port in (4317, 16686):
                self._process.wait_for_port(port)
        except BaseException:
            self._process.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.stop()

    def query(self, path: str) -> Any:
        """What the query API, which the user interface speaks, has under ``/api/``."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:16686/api/{path}", timeout=REQUEST_SECONDS) as response:
            return json.loads(response.read())["data"]

    def log(self) -> str:
        assert self._process is not None
        return self._process.output()
