"""Every setting of Spanloom: its type, its bounds, its default and what it means.

In: nothing. Out: the frozen ``Config`` and its sections, and what can be derived from them in words. Never: a file, the
environment, a look at the machine; ``agent.config`` reads and checks.

The texts of the settings are data (``msgspec.Meta``): docs/configuration.md is generated from them by
``agent.config_doc``, which also makes the JSON schema for the Helm chart.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import Meta, field

from agent.redaction import DEFAULT_QUERY_KEYS


def _help(description: str, expect: str = "") -> Meta:
    """The text of a setting; ``expect`` says in words what no bound of the type can express."""
    return Meta(description=description, extra={"expect": expect} if expect else None)


Glob = Annotated[str, Meta(min_length=1, max_length=256)]
Port = Annotated[int, Meta(ge=1, le=65535)]
HeaderName = Annotated[str, Meta(min_length=1, max_length=128)]
FilePath = Annotated[str, Meta(min_length=1, max_length=4096, extra={"expect": "the path of a file"})]
ShortText = Annotated[str, Meta(max_length=4096)]
AttributeValue = Annotated[
    ShortText | bool | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | float,
    Meta(extra={"expect": "a text, true or false, a 64-bit integer or a number"}),
]
ProtocolName = Literal["http1", "http2"]
"""The names of ``agent.protocols.PROTOCOLS``."""
Format = Literal["tracecontext", "grpc", "b3", "b3multi", "jaeger", "xray", "datadog"]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of settings."""


class Executables(Section, frozen=True):
    """Which programs are traced, by glob (`*`, `?`, `[…]`) on the executable's name, or its path if it has a `/`."""

    include: Annotated[
        tuple[Glob, ...], Meta(min_length=1, max_length=256), _help("A process is traced when one of these matches.")
    ] = ("*",)
    exclude: Annotated[
        tuple[Glob, ...],
        Meta(max_length=256),
        _help("A process is not traced when one of these matches, whatever `include` says."),
    ] = ()


class Ports(Section, frozen=True):
    """Which connections are traced, by the port of the server's end."""

    include: Annotated[
        tuple[Port, ...], Meta(max_length=1024), _help("Only these ports are traced; an empty list means all of them.")
    ] = ()
    exclude: Annotated[
        tuple[Port, ...], Meta(max_length=1024), _help("These ports are not traced, whatever `include` says.")
    ] = ()


class Namespaces(Section, frozen=True):
    """Which namespaces are traced, by glob."""

    include: Annotated[
        tuple[Glob, ...], Meta(max_length=256), _help("Pods of these namespaces are traced; an empty list: none.")
    ] = ("*",)
    exclude: Annotated[
        tuple[Glob, ...], Meta(max_length=256), _help("Pods of these are not traced, whatever `include` says.")
    ] = ()


class Containers(Section, frozen=True):
    """Which containers are traced, by glob on the container's name in the pod."""

    include: Annotated[tuple[Glob, ...], Meta(max_length=256), _help("Containers with these names are traced.")] = (
        "*",
    )
    exclude: Annotated[
        tuple[Glob, ...], Meta(max_length=256), _help("Containers with these are not, whatever `include` says.")
    ] = ()


class SelectKubernetes(Section, frozen=True):
    """Which pods are traced. The process must be selected by the criteria of the host, too."""

    namespaces: Namespaces = field(default_factory=Namespaces)
    containers: Containers = field(default_factory=Containers)
    labels: Annotated[
        str,
        Meta(max_length=4096),
        _help(
            "Only pods with these labels are traced; empty: all.",
            'a label selector such as "app=shop,tier notin (db, cache)"',
        ),
    ] = ""
    annotation: Annotated[
        bool,
        _help(
            'Pods may decide for themselves: annotation `spanloom.io/trace: "false"` keeps a pod out whatever else is '
            'set, `"true"` takes it in whatever its namespace and labels are.'
        ),
    ] = True


class Select(Section, frozen=True):
    """What is traced. The agent never traces itself."""

    executables: Executables = field(default_factory=Executables)
    ports: Ports = field(default_factory=Ports)
    host: Annotated[bool, _help("Trace processes that are in no pod, when the agent runs in Kubernetes.")] = True
    kubernetes: SelectKubernetes = field(default_factory=SelectKubernetes)


class Capture(Section, frozen=True):
    """What is taken from each exchange."""

    enabled: Annotated[
        bool,
        _help(
            "Whether the probes are attached. Detached they cost the applications nothing; what is under way then is "
            "dropped and counted as `switched_off`, and connections that stay open are picked up when it is true again."
        ),
    ] = True
    protocols: Annotated[
        tuple[ProtocolName, ...],
        _help(
            "Protocols that become spans; what only others would read is dropped and counted as `protocol_off`. "
            "`http2` includes gRPC; without it the kernel does not follow HTTP/2 at all."
        ),
    ] = ("http1", "http2")
    tls: Annotated[
        bool,
        _help(
            "Whether HTTPS is traced: what processes give to OpenSSL, BoringSSL, LibreSSL, GnuTLS and Go's crypto/tls, "
            "or get from them, is read where they call the library. Processes that use TLS in another way are named "
            "in the log."
        ),
    ] = True
    tls_idle_seconds: Annotated[
        float,
        Meta(ge=0, le=86400),
        _help("How long the probes stay on a TLS library that no process runs any more."),
    ] = 300.0
    announce_open_seconds: Annotated[
        Annotated[float, Meta(ge=0.2, le=86400)] | None,
        _help(
            "A request that is still open after this long (a gRPC stream, a long poll) is told of by another span, "
            "`<name> (opened)`: of kind INTERNAL, without a length, at the request's beginning, and with the attribute "
            "`spanloom.opened`. It is the child of the request's span, which comes with its end; null: never."
        ),
    ] = None
    request_head_bytes: Annotated[
        int,
        Meta(ge=256, le=8192),
        _help(
            "Bytes of a request's head that are copied; trace headers behind this limit are not seen. Live up to "
            "`limits.request_head_bytes`."
        ),
    ] = 1024
    response_head_bytes: Annotated[
        int,
        Meta(ge=64, le=2048),
        _help(
            "Bytes of a response's head that are copied, and of the body behind a shorter one: where a status of "
            "gRPC-Web is read. Live up to `limits.response_head_bytes`."
        ),
    ] = 256
    request_headers: Annotated[
        tuple[HeaderName, ...],
        Meta(max_length=64),
        _help("Request headers exported as `http.request.header.<name>`; none by default."),
    ] = ()
    response_headers: Annotated[
        tuple[HeaderName, ...],
        Meta(max_length=64),
        _help("Response headers exported as `http.response.header.<name>`; none by default."),
    ] = ()
    dangerously_allow_secret_headers: Annotated[
        bool,
        _help(
            "Allows the two lists above to name headers that carry credentials (`authorization`, `cookie`, API keys, "
            "tokens), which are refused otherwise. Whoever can read the traces can then use the credentials."
        ),
    ] = False


class Redaction(Section, frozen=True):
    """What is blanked in the data that is exported."""

    query_keys: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...],
        Meta(max_length=256),
        _help(
            "Query parameters (case-sensitive) whose value becomes `REDACTED`. A list given here replaces the default."
        ),
    ] = DEFAULT_QUERY_KEYS


class Propagation(Section, frozen=True):
    """How the trace context of a request is found."""

    formats: Annotated[
        tuple[Format, ...],
        _help(
            "Header formats that are read, the most trusted first. The first valid one decides; others that disagree "
            "become span links. `grpc` is `grpc-trace-bin`. Each may stand once; an empty list reads none."
        ),
    ] = ("tracecontext", "grpc", "b3", "b3multi", "jaeger", "xray", "datadog")


class Sampling(Section, frozen=True):
    """Which traces are kept."""

    ratio: Annotated[float, Meta(ge=0, le=1), _help("Share of the traces that is kept, decided from the trace id.")] = (
        1.0
    )
    parent_based: Annotated[
        bool, _help("Follow the sampled flag of the caller where there is one; `ratio` then decides for the rest only.")
    ] = True


class Routes(Section, frozen=True):
    """Where `http.route` and the span name come from."""

    patterns: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=1024)], ...],
        Meta(max_length=1024),
        _help(
            "Routes such as `/users/{id}`, `GET /users/{id}` or `/static/*`; the first that matches is `http.route`.",
            'a list of paths such as "/users/{id}"',
        ),
    ] = ()
    guess: Annotated[
        bool, _help("Guess a low-cardinality path for the span name when no pattern matches; never fills `http.route`.")
    ] = False


class Otlp(Section, frozen=True):
    """OTLP/gRPC export. The `OTEL_EXPORTER_OTLP_*` variables give the defaults, see the end of this page."""

    endpoint: Annotated[
        Annotated[str, Meta(max_length=2048)] | None,
        _help(
            "Where spans are sent; `https` means TLS; without a port it is 4317. "
            "`null`: nothing is sent and `export.console` shows the spans.",
            "http://HOST:PORT, https://HOST:PORT, HOST:PORT or null",
        ),
    ] = None
    headers: Annotated[
        dict[HeaderName, ShortText],
        Meta(max_length=64),
        _help("gRPC metadata sent with each batch. The values are secrets: `--print-config` shows `***`."),
    ] = field(default_factory=dict)
    compression: Annotated[Literal["none", "gzip"], _help("Compression of the batches.")] = "none"
    timeout_seconds: Annotated[float, Meta(ge=0.001, le=300), _help("How long one attempt to send may take.")] = 10.0
    insecure: Annotated[
        bool | None,
        _help(
            "For an endpoint without a scheme: `true` sends plain text, `false` and `null` use TLS."
            " A scheme overrides it."
        ),
    ] = None
    certificate: Annotated[
        FilePath | None, _help("PEM file of the authorities that are trusted; `null`: those of the system.")
    ] = None
    client_key: Annotated[
        FilePath | None, _help("PEM file of the client's private key; needs `client_certificate`.")
    ] = None
    client_certificate: Annotated[
        FilePath | None, _help("PEM file of the client's certificate; needs `client_key`.")
    ] = None


class Batch(Section, frozen=True):
    """When a batch of spans is sent: at the first of the two."""

    max_spans: Annotated[int, Meta(ge=1, le=8192), _help("Spans in one batch.")] = 2048
    max_delay_seconds: Annotated[float, Meta(ge=0.01, le=60), _help("How long the oldest span may wait.")] = 1.0


class Export(Section, frozen=True):
    """Where spans go."""

    otlp: Otlp = field(default_factory=Otlp)
    batch: Batch = field(default_factory=Batch)
    queue_spans: Annotated[
        int,
        Meta(ge=1, le=1_000_000),
        _help("Spans that may wait for a slow or absent collector; further ones are dropped and counted."),
    ] = 65536
    console: Annotated[
        Literal["auto", "tree", "json", "off"],
        _help(
            "Spans on standard output: `tree` waterfalls, `json` one object per line. `auto`: nothing with an OTLP "
            "endpoint, else `tree` on a terminal and `json` elsewhere."
        ),
    ] = "auto"


class Stitching(Section, frozen=True):
    """How long spans wait for the rest of their trace. Children finish before their parents."""

    hold_seconds: Annotated[
        float, Meta(ge=0, le=60), _help("How long a span waits for its root before it is released early, and counted.")
    ] = 5.0
    hold_spans: Annotated[
        int,
        Meta(ge=1, le=1_000_000),
        _help("Spans that may wait; at the limit the oldest are released early, and counted."),
    ] = 50_000


class Limits(Section, frozen=True):
    """Bounds on what is followed at once. What is beyond them is counted as dropped."""

    connections: Annotated[int, Meta(ge=16, le=4_194_304), _help("Connections whose state the kernel keeps.")] = 32768
    exchange_timeout_seconds: Annotated[
        float,
        Meta(ge=1, le=86400),
        _help(
            "An exchange of HTTP/1 without any traffic for this long is reported as timed out. A stream of HTTP/2 may "
            "be silent for as long as its connection lasts."
        ),
    ] = 600.0
    processes: Annotated[int, Meta(ge=16, le=1_048_576), _help("Processes that are remembered.")] = 8192
    request_head_bytes: Annotated[
        Annotated[int, Meta(ge=256, le=8192)] | None,
        _help(
            "Room for `capture.request_head_bytes` to grow without a restart, in kernel memory of each tracked "
            "connection; null: its value at the start.",
        ),
    ] = None
    response_head_bytes: Annotated[
        Annotated[int, Meta(ge=64, le=2048)] | None,
        _help("The same for `capture.response_head_bytes`."),
    ] = None


class Kernel(Section, frozen=True):
    """The way from the kernel to the agent."""

    backend: Annotated[
        Literal["auto", "syscalls", "sockets"],
        _help(
            "Where the probes sit: on all system calls, which every kernel allows, or in the socket layer, which costs "
            "less and needs Linux 6.16. `auto` takes the cheaper one that the kernel has; `spanloom check` "
            "says which that is, and why."
        ),
    ] = "auto"
    ring_buffer_bytes: Annotated[
        int,
        Meta(ge=4096, le=1 << 30),
        _help(
            "Size of the buffer shared with the kernel; records that do not fit are dropped and counted.",
            "a power of two from 4096 to 1073741824, and a multiple of the page size",
        ),
    ] = 8_388_608
    poll_seconds: Annotated[
        float, Meta(ge=0.001, le=1), _help("How often the buffer is emptied; shorter is fresher, longer is cheaper.")
    ] = 0.5
    sweep_seconds: Annotated[
        float, Meta(ge=0.01, le=10), _help("How often exchanges that are still open are looked at.")
    ] = 0.5


class Resource(Section, frozen=True):
    """What is said about the source of the spans."""

    attributes: Annotated[
        dict[Annotated[str, Meta(min_length=1, max_length=256)], AttributeValue],
        Meta(max_length=128),
        _help("Attributes added to every resource, such as `deployment.environment.name: production`."),
    ] = field(default_factory=dict)


class Kubernetes(Section, frozen=True):
    """Pods instead of processes: where the metadata comes from."""

    enabled: Annotated[
        Literal["auto", "on", "off"],
        _help("Whether pods are asked for at the API server. `auto`: when the agent itself runs in a pod."),
    ] = "auto"
    node_name: Annotated[
        Annotated[str, Meta(min_length=1, max_length=253)] | None,
        _help("The node whose pods are watched; by default the environment variable `NODE_NAME`.", "a text or null"),
    ] = None
    cluster_name: Annotated[
        Annotated[str, Meta(min_length=1, max_length=256)] | None,
        _help("Exported as `k8s.cluster.name`.", "a text or null"),
    ] = None
    use_labels: Annotated[
        bool, _help("Names and versions of services may come from the `app.kubernetes.io/…` labels, too.")
    ] = False
    peers: Annotated[
        bool,
        _help(
            "Whether called services and pods are named (`service.peer.name`). Costs the API server a watch of all "
            "services and endpoint slices per node (docs/scale.md), and the agent memory for them."
        ),
    ] = False
    wait_seconds: Annotated[
        float,
        Meta(ge=0, le=30),
        _help("How long spans of a pod that is not known yet are held before they leave without its metadata."),
    ] = 2.0
    service_account: Annotated[
        str, Meta(min_length=1, max_length=4096), _help("Where the token and the API server's certificate are mounted.")
    ] = "/var/run/secrets/kubernetes.io/serviceaccount"


class Telemetry(Section, frozen=True):
    """What the agent says about itself."""

    listen: Annotated[
        Annotated[str, Meta(max_length=256)] | None,
        _help(
            "Where `/metrics`, `/healthz` and `/readyz` are served; port 0 takes a free one, `null` turns them off.",
            'HOST:PORT such as "127.0.0.1:9469" or "[::]:9469", or null',
        ),
    ] = "127.0.0.1:9469"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], _help("The least severe log events that are written.")
    ] = "info"
    log_format: Annotated[
        Literal["auto", "json", "text"],
        _help("Form of the log on standard error. `auto`: `text` on a terminal, else `json`."),
    ] = "auto"


class Config(Section, frozen=True):
    """The whole configuration. ``Config()`` holds the defaults."""

    select: Select = field(default_factory=Select)
    capture: Capture = field(default_factory=Capture)
    redaction: Redaction = field(default_factory=Redaction)
    propagation: Propagation = field(default_factory=Propagation)
    sampling: Sampling = field(default_factory=Sampling)
    routes: Routes = field(default_factory=Routes)
    export: Export = field(default_factory=Export)
    stitching: Stitching = field(default_factory=Stitching)
    limits: Limits = field(default_factory=Limits)
    kernel: Kernel = field(default_factory=Kernel)
    resource: Resource = field(default_factory=Resource)
    kubernetes: Kubernetes = field(default_factory=Kubernetes)
    telemetry: Telemetry = field(default_factory=Telemetry)
    overrides: Annotated[
        tuple[Annotated[dict[str, Any], Meta(extra={"expect": "a map with until, match and set"})], ...],
        Meta(max_length=64),
        _help(
            "Other settings for some processes until a moment: each item has `until` (RFC 3339), `match` (globs for "
            "namespace, pod, container, executable, service) and `set` (settings of sampling, routes and redaction, "
            "and the two lists of captured headers).",
            "a list of at most 64 overrides, each with until, match and set",
        ),
    ] = ()


def leaves(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, annotated type)`` of every setting in order."""
    for name, annotation in fields_of(section).items():
        if is_section(annotation):
            yield from leaves(annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, annotation


@functools.cache  # evaluating the annotations anew is most of what loading a configuration costs
def fields_of(section: type[Section]) -> Mapping[str, Any]:
    """Map the names of a section's fields, in order, to their annotated types; a sub-section is its bare class."""
    return MappingProxyType({info.name: info.type for info in msgspec.structs.fields(section)})


def is_section(annotation: Any) -> bool:
    """Tell whether a field's type is a section rather than a setting."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def bare_type(annotation: Any) -> Any:
    """Strip ``Annotated``."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def describe(annotation: Any) -> str:
    """Say in words which values a setting's type accepts, for example ``an integer from 256 to 8192``."""
    metas = [meta for meta in getattr(annotation, "__metadata__", ()) if isinstance(meta, Meta)]
    limits: dict[str, Any] = {}
    for meta in metas:
        if meta.extra and "expect" in meta.extra:
            return meta.extra["expect"]
        limits.update({n: v for n in ("ge", "le", "min_length", "max_length") if (v := getattr(meta, n)) is not None})
    bare = bare_type(annotation)
    origin, arguments = get_origin(bare), get_args(bare)
    shortest, longest = limits.get("min_length", 0), limits.get("max_length")
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin in (Union, UnionType):
        return " or ".join("null" if item is type(None) else describe(item) for item in arguments)
    if origin in (tuple, dict):
        item = describe(arguments[0] if origin is tuple else arguments[1])
        text = f"a list, each item {item}" if origin is tuple else f"a map of names, each value {item}"
        count = f"{shortest} to {longest}" if shortest else f"at most {longest}"
        return f"{text} ({count} of them)" if longest else text
    if bare is str:
        return f"a text of {shortest} to {longest} characters" if longest else "a text"
    if bare is bool:
        return "true or false"
    text = "an integer" if bare is int else "a number"
    return f"{text} from {limits['ge']} to {limits['le']}" if "ge" in limits else text
