"""The configuration: sources, precedence, errors, what is never shown, and the generated reference."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import config_doc, config_yaml
from agent.config import MAX_FILE_BYTES, dump, load
from agent.config_schema import Config, describe, leaves
from agent.errors import ConfigError
from agent.otlp.settings import parse_endpoint
from agent.redaction import DEFAULT_QUERY_KEYS
from agent.telemetry import parse_listen

FIXED = """
select:      {executables: {include: ["*"], exclude: []}, ports: {include: [], exclude: []}}
capture:     {request_head_bytes: 1024, response_head_bytes: 256, request_headers: [], response_headers: []}
propagation: {formats: [tracecontext, grpc, b3, b3multi, jaeger, xray, datadog]}
sampling:    {ratio: 1.0, parent_based: true}
routes:      {patterns: [], guess: false}
export:      {otlp: {endpoint: null, headers: {}, compression: none, timeout_seconds: 10}, console: auto}
telemetry:   {listen: "127.0.0.1:9469"}
"""
"""The keys and defaults that users may rely on for ever."""


def value(config: Config, key: str) -> object:
    result: object = config
    for part in key.split("."):
        result = getattr(result, part)
    return result


def with_set(*overrides: str, **environ: str) -> Config:
    return load(None, overrides, environ)


def with_file(tmp_path: Path, text: str | bytes, *overrides: str, **environ: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load(path, overrides, environ)


def error_of(call, *arguments, **environ) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **environ)
    text = str(caught.value)
    assert text.isprintable(), "an error is one line that cannot disturb a terminal"
    return text


def attempt(call, *arguments, **environ) -> object:
    """The result of the call, or the ConfigError it raised; anything else it raises fails the test."""
    try:
        return call(*arguments, **environ)
    except ConfigError as error:
        return error


# ---- Sources -----------------------------------------------------------------------------------------------------


def test_no_source_gives_the_defaults():
    """Without file, overrides and variables the configuration is the default one."""
    assert load(None, [], {}) == Config()


def test_fixed_keys_have_their_defaults(tmp_path):
    """A file of all the promised keys with their promised defaults is accepted and changes nothing."""
    assert with_file(tmp_path, FIXED) == Config()


def test_precedence_environment_file_set(tmp_path):
    """--set wins over the file, the file over the environment, the environment over the default."""
    environ = {"OTEL_EXPORTER_OTLP_TIMEOUT": "2500"}
    text = "export: {otlp: {timeout_seconds: 3}}"
    key = "export.otlp.timeout_seconds"
    assert value(with_set(**environ), key) == 2.5
    assert value(with_file(tmp_path, text, **environ), key) == 3.0
    assert value(with_file(tmp_path, text, f"{key}=4", **environ), key) == 4.0


def test_file_null_overrides_environment(tmp_path):
    """A null that is written in the file is a value: it wins over the environment."""
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"}
    assert with_file(tmp_path, "export: {otlp: {endpoint: null}}", **environ).export.otlp.endpoint is None
    assert with_file(tmp_path, "export: {otlp: {}}", **environ).export.otlp.endpoint == "http://collector:4317"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "capture:\nexport:\n  otlp:\n", "\ufeff{}"])
def test_empty_file_and_sections_say_nothing(tmp_path, text):
    """An empty file, and a section whose keys are all commented out, leave the defaults."""
    assert with_file(tmp_path, text) == Config()


def test_last_set_wins():
    """Of two overrides of one key the later one counts."""
    assert with_set("sampling.ratio=0.5", "sampling.ratio=0.25").sampling.ratio == 0.25


def test_set_takes_lists_maps_and_sections():
    """The value of --set is YAML: lists, maps and whole sections; a section only changes what it names."""
    config = with_set("select.ports.include=[80, 8080]", "capture={request_head_bytes: 512}", "telemetry.listen=")
    assert config.select.ports.include == (80, 8080)
    assert config.capture.request_head_bytes == 512
    assert config.capture.response_head_bytes == 256
    assert config.telemetry.listen is None


def test_set_adds_one_key_of_a_map_even_with_dots():
    """Below a map the rest of the key is one map key, so that dotted attribute names need no quoting."""
    config = with_set("resource.attributes={a: 1}", "resource.attributes.deployment.environment.name=prod")
    assert config.resource.attributes == {"a": 1, "deployment.environment.name": "prod"}


@pytest.mark.parametrize("text", ["off", '"off"', "'off'", "false"])
def test_bare_off_means_off(tmp_path, text):
    """YAML reads a bare off as false; for the console both mean off."""
    assert with_file(tmp_path, f"export: {{console: {text}}}").export.console == "off"


def test_helm_style_integers():
    """An integer that Helm rendered as a float is still that integer; a fraction is refused."""
    assert with_set("kernel.ring_buffer_bytes=8.388608e+06").kernel.ring_buffer_bytes == 8_388_608
    assert "must be an integer" in error_of(with_set, "limits.processes=100.5")


def test_dates_stay_text(tmp_path):
    """A date is no YAML surprise: it stays the text that was written."""
    assert with_file(tmp_path, "resource: {attributes: {release: 2024-01-31}}").resource.attributes == {
        "release": "2024-01-31"
    }


def test_header_names_become_lower_case_and_distinct():
    """Captured headers are kept in the form that attribute names need."""
    assert with_set("capture.request_headers=[X-Foo, x-bar, x-foo]").capture.request_headers == ("x-foo", "x-bar")


# ---- Environment -------------------------------------------------------------------------------------------------


def test_environment_reads_every_variable():
    """Each OTLP variable sets its key, with the units and forms of the specification."""
    otlp = with_set(
        OTEL_EXPORTER_OTLP_ENDPOINT="HTTPS://collector:4317/",
        OTEL_EXPORTER_OTLP_INSECURE="True",
        OTEL_EXPORTER_OTLP_CERTIFICATE="/ca.pem",
        OTEL_EXPORTER_OTLP_CLIENT_KEY="/key.pem",
        OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE="/client.pem",
        OTEL_EXPORTER_OTLP_HEADERS=" Api-Key = a%20b%3D%2C ,, tenant=x=y",
        OTEL_EXPORTER_OTLP_COMPRESSION="gzip",
        OTEL_EXPORTER_OTLP_TIMEOUT="50",
    ).export.otlp
    assert msgspec.to_builtins(otlp) == {
        "endpoint": "https://collector:4317",
        "insecure": True,
        "certificate": "/ca.pem",
        "client_key": "/key.pem",
        "client_certificate": "/client.pem",
        "headers": {"api-key": "a b=,", "tenant": "x=y"},
        "compression": "gzip",
        "timeout_seconds": 0.05,
    }


def test_traces_variable_wins_and_empty_is_unset():
    """The TRACES form wins over the general one; an empty variable counts as unset."""
    general, traces = "OTEL_EXPORTER_OTLP_COMPRESSION", "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION"
    assert with_set(**{general: "none", traces: "gzip"}).export.otlp.compression == "gzip"
    assert with_set(**{general: "gzip", traces: " "}).export.otlp.compression == "gzip"


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("ENDPOINT", "ftp://collector:21"),
        ("ENDPOINT", "http://collector:0"),
        ("INSECURE", "yes"),
        ("HEADERS", "novalue"),
        ("HEADERS", "a=%ff"),
        ("HEADERS", "a%0a=b"),
        ("COMPRESSION", "zstd"),
        ("TIMEOUT", "10s"),
        ("TIMEOUT", "0"),
        ("TIMEOUT", "٣"),
        ("CERTIFICATE", "x" * 5000),
    ],
)
def test_bad_environment_value_names_the_variable(suffix, text):
    """A bad value is reported under the name of the variable that holds it, not of the key."""
    name = f"OTEL_EXPORTER_OTLP_TRACES_{suffix}"
    assert error_of(with_set, **{name: text}).startswith(f"{name}: ")


# ---- Errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "error"),
    [
        (
            "capture.request_head_byts=5",
            "capture.request_head_byts: unknown key; did you mean capture.request_head_bytes?",
        ),
        ("captur.request_head_bytes=5", "captur: unknown key; did you mean capture?"),
        ("queue_spans=5", "queue_spans: unknown key; did you mean export.queue_spans?"),
        ("sampling.ratio.x=5", "sampling.ratio.x: unknown key; did you mean sampling.ratio?"),
        ("sampling.zzz=5", "sampling.zzz: unknown key; valid here: ratio, parent_based"),
        ("sampling.=5", "sampling.'': unknown key; valid here: ratio, parent_based"),
        ("capture={request_heads: 1}", "capture.request_heads: unknown key; did you mean capture.request_headers?"),
        ("sampling.ratio", "--set sampling.ratio: must be key=value, for example --set sampling.ratio=0.1"),
        (
            "capture.request_head_bytes=255",
            "capture.request_head_bytes: must be an integer from 256 to 8192, not 255",
        ),
        (
            "capture.request_head_bytes=lots",
            "capture.request_head_bytes: must be an integer from 256 to 8192, not 'lots'",
        ),
        ("capture.request_head_bytes=", "capture.request_head_bytes: must be an integer from 256 to 8192, not null"),
        ("sampling.ratio=.nan", "sampling.ratio: must be a number from 0 to 1, not nan"),
        ("sampling.parent_based=1", "sampling.parent_based: must be true or false, not 1"),
        ("export.console=on", "export.console: must be one of auto, tree, json, off, not true"),
        ("select.ports.include=[80, 0]", "select.ports.include[1]: must be an integer from 1 to 65535, not 0"),
        ("select.ports=80", "select.ports: must be a map of settings, not 80"),
        ("propagation.formats=[b3, b3]", "propagation.formats: b3 is listed twice; each format may stand once"),
        (
            "propagation.formats=[b4]",
            "propagation.formats[0]: must be one of tracecontext, grpc, b3, b3multi, jaeger, xray, datadog, not 'b4'",
        ),
        (
            "resource.attributes.a=.inf",
            "resource.attributes.a: must be a text, true or false, a 64-bit integer or a number, not inf "
            "(put a text in quotes)",
        ),
        (
            "kernel.ring_buffer_bytes=1000000",
            f"kernel.ring_buffer_bytes: must be a power of two and a multiple of {mmap.PAGESIZE}, such as 524288, "
            "not 1000000",
        ),
        (
            "telemetry.listen=0.0.0.0",
            'telemetry.listen: must be HOST:PORT such as "127.0.0.1:9469" or "[::]:9469", or null, not \'0.0.0.0\'',
        ),
        ("export.otlp.endpoint=http://[:::]:4317", "export.otlp.endpoint: '[:::]' is no IPv6 address"),
        ('export.otlp.endpoint="[1:2:3]"', "export.otlp.endpoint: '[1:2:3]' is no IPv6 address"),
        (
            "export.otlp.endpoint=http://jaeger:4318/v1/traces",
            "export.otlp.endpoint: must be http://HOST:PORT, https://HOST:PORT or HOST:PORT without a path, not "
            "'http://jaeger:4318/v1/traces'",
        ),
        (
            "export.otlp.client_key=/key.pem",
            "export.otlp.client_certificate: missing; client_key and client_certificate must be given together",
        ),
        ("export.queue_spans=100", "export.batch.max_spans: must be at most export.queue_spans (100), not 2048"),
        (
            "routes.patterns=[users]",
            "routes.patterns: route pattern 'users': write a path such as /users/{id}, with or without a method",
        ),
        ("capture.request_headers=[a b]", "capture.request_headers: 'a b' is not a header name"),
    ],
)
def test_errors_name_the_key_the_fault_and_the_remedy(override, error):
    """The one line of each error is exact."""
    assert error_of(with_set, override) == error


@pytest.mark.parametrize("key", [key for key, _ in leaves()])
def test_every_setting_refuses_a_wrong_type_under_its_own_name(tmp_path, key):
    """No setting accepts a list of a list, and the error begins with its dotted key and says what would be right."""
    annotation = dict(leaves())[key]
    error = error_of(with_set, f"{key}=[[]]")
    assert error.startswith((f"{key}: must be ", f"{key}[0]: must be "))
    if not error.startswith(f"{key}[0]"):
        assert describe(annotation) in error


@pytest.mark.parametrize(
    ("key", "low", "high"),
    [
        ("capture.request_head_bytes", 256, 8192),
        ("capture.response_head_bytes", 64, 2048),
        ("sampling.ratio", 0, 1),
        ("export.otlp.timeout_seconds", 0.001, 300),
        ("export.batch.max_spans", 1, 8192),
        ("stitching.hold_seconds", 0, 60),
        ("limits.connections", 16, 4194304),
        ("kernel.poll_seconds", 0.001, 1),
    ],
)
def test_bounds_are_inclusive(key, low, high):
    """Both ends of a range are accepted and what is beyond them is refused."""
    assert value(with_set(f"{key}={low}"), key) == low
    assert value(with_set(f"{key}={high}"), key) == high
    assert "must be" in error_of(with_set, f"{key}={low - 1}")
    assert "must be" in error_of(with_set, f"{key}={high + 1}")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("capture:\n  a: b: c\n", ":2:7: not valid YAML: mapping values are not allowed here"),
        ("a: [1, 2\n", ":2:1: not valid YAML: "),
        ("sampling: {ratio: 1}\nsampling: {ratio: 0}\n", ":2:1: the key 'sampling' is given twice"),
        ("select: {executables: {include: [*]}}", ":1:35: not valid YAML: a text that begins with * or & must be in"),
        ("a: &x 1\nb: *x\n", ":1:4: anchors (&) and aliases (*) are not supported"),
        ("a: !!python/object/apply:os.system [x]", ":1:4: tags (!) are not supported"),
        ("--- 1\n--- 2\n", ":2:1: a second YAML document begins here; only one is allowed"),
        ("? [a]\n: 1\n", ":1:3: a key must be a plain text"),
        ("a: \x00", ":1:4: character U+0000 is not allowed"),
        ('a: "\\ud800"', ":1:4: a surrogate is not a character"),
        ("a: 0b_", ":1:4: not a number"),
        (b"a: 1\nb: \xff\n", ":2:4: not UTF-8 text"),
        (b"x" * (MAX_FILE_BYTES + 1), ": the configuration file is larger than 1048576 bytes"),
    ],
)
def test_file_errors_say_where(tmp_path, text, where):
    """What is no YAML for us is reported with file, line and column."""
    error = error_of(with_file, tmp_path, text)
    assert error.startswith(f"{tmp_path}/config.yaml{where}")


@pytest.mark.parametrize("text", ["- a", "text", "1"])
def test_file_that_is_no_map(tmp_path, text):
    """A file that is not a map of sections is refused."""
    assert error_of(with_file, tmp_path, text).startswith("the configuration: must be a map of settings, not ")


def test_keys_that_are_not_text(tmp_path):
    """A key that YAML reads as a number or null is an unknown key, not a crash."""
    assert error_of(with_file, tmp_path, "capture: {1: 2}").startswith("capture.1: unknown key; valid here: ")
    assert error_of(with_file, tmp_path, "null: 2").startswith("null: unknown key; valid here: ")
    assert error_of(with_file, tmp_path, '"a\\nb": 2').startswith("'a\\nb': unknown key; ")
    assert "the name 1: must be a text" in error_of(with_file, tmp_path, "resource: {attributes: {1: 2}}")


@pytest.mark.parametrize("name", ["missing.yaml", ".", "nul\0"])
def test_unreadable_file(tmp_path, name):
    """A file that cannot be read is an error that names it."""
    assert "cannot read the configuration file: " in error_of(load, tmp_path / name, [], {})


def test_endless_file_is_cut_off():
    """The size limit holds for files that never end."""
    assert "larger than" in error_of(load, Path("/dev/zero"), [], {})


def test_set_yaml_error_shows_how_to_quote():
    """A --set value that YAML cannot read names the key and shows how to quote."""
    error = error_of(with_set, "telemetry.listen=[::]:9469")
    assert error.startswith("--set telemetry.listen:1:2: not valid YAML: ")
    assert "quote special texts" in error
    assert with_set('telemetry.listen="[::]:9469"').telemetry.listen == "[::]:9469"


# ---- Hostile text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[" * 10_000, "1:17: nested more than 16 levels deep"),
        ("{a: " * 10_000, "1:65: nested more than 16 levels deep"),
        ("- " * 10_000, "1:33: nested more than 16 levels deep"),
        ("a: " + "1:" * 10_000 + "1", "1:4: a number of this length is not supported"),
        ("a: " + "9" * 10_000, "1:4: a number of this length is not supported"),
        ("[" + "1," * 10_000 + "]", "1:200: more than 100 values"),
        ("a: &a [x]\n" + "b: [*a, *a, *a]\n" * 1000, "1:4: anchors (&) and aliases (*) are not supported"),
    ],
    ids=["brackets", "braces", "dashes", "base-60", "digits", "wide", "aliases"],
)
def test_hostile_yaml_is_refused_where_the_bound_is_reached(monkeypatch, text, error):
    """Depth, width, number length and references are bounded, and reading stops at the first thing beyond a bound."""
    monkeypatch.setattr(config_yaml, "MAX_NODES", 100)
    assert error_of(config_yaml.parse, text, "file").startswith(f"file:{error}")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(alphabet=st.sampled_from(list("ab:-[]{}?,&*!|>'\"%@#~<=\n\t \\01.x_é\u2028\x85\ufeff\0"))))
def test_any_yaml_gives_a_value_or_a_config_error(text):
    """No text makes the reader raise anything but ConfigError, and what it returns is plain data."""
    result = attempt(config_yaml.parse, text, "file")
    assert isinstance(result, str | int | float | bool | list | dict | None) or str(result).isprintable()


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["otlp", "headers", "console", "x"]), inner, max_size=3)
        ),
        max_leaves=6,
    ),
    st.sampled_from([key for key, _ in leaves()] + ["export", "export.otlp", "export.otlp.headers.x", "", ".", "x"]),
)
def test_any_value_anywhere_gives_a_config_or_a_config_error(data, key):
    """Whatever value is set at whatever key: a valid configuration or a one-line ConfigError."""
    result = attempt(with_set, f"{key}={yaml.safe_dump(data, default_flow_style=True)}")
    if isinstance(result, Config):
        assert msgspec.convert(msgspec.to_builtins(result), Config) == result
    else:
        assert "\n" not in str(result)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["ENDPOINT", "HEADERS", "COMPRESSION", "TIMEOUT", "INSECURE", "CERTIFICATE"]),
    st.text(max_size=20) | st.from_regex(r"[a=%,0-9]{0,8}", fullmatch=True),
)
def test_any_environment_gives_a_config_or_a_config_error(suffix, text):
    """No variable makes the reader raise anything but ConfigError."""
    result = attempt(with_set, **{f"OTEL_EXPORTER_OTLP_{suffix}": text})
    assert isinstance(result, Config) or "\n" not in str(result)


def test_plain_files_read_as_safe_load_reads_them():
    """Scalars mean what yaml.safe_load makes of them."""
    text = (
        "a: [1, 0x1f, 0o7, 017, 1.5, 1e3, 1.0e+3, .5, yes, Off, ~, null, '', '1', abc, 1_000, 10:30, -.inf]\n"
        "b:\n  c: |\n    x\n  d: >-\n    y\n    z\n"
    )
    assert config_yaml.parse(text, "file") == yaml.safe_load(text)


# ---- Secrets -----------------------------------------------------------------------------------------------------


SECRET = "hunter2-hunter2"


@pytest.mark.parametrize(
    "arguments",
    [
        ([f"export.otlp.headers.key=[{SECRET}]"], {}),
        ([f"export.otlp.headers.key={{a: {SECRET}}}"], {}),
        ([f'export.otlp.headers.key="{SECRET}\\n"'], {}),
        ([f"export.otlp.headers={SECRET}"], {}),
        ([f"export.otlp.endpoint=http://user:{SECRET}@host:4317"], {}),
        ([f"export.otlp.headers.key={SECRET}: : x"], {}),
        ([], {"OTEL_EXPORTER_OTLP_HEADERS": SECRET}),
        ([], {"OTEL_EXPORTER_OTLP_HEADERS": f"key={SECRET}\x7f"}),
        ([], {"OTEL_EXPORTER_OTLP_HEADERS": f"grpc-x={SECRET}"}),
        ([], {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://user:{SECRET}@host:4317"}),
    ],
)
def test_errors_never_show_secrets(arguments):
    """An error about a header value, or an endpoint with a password, does not repeat it."""
    assert SECRET not in error_of(load, None, *arguments)


def test_dump_hides_header_values():
    """The effective configuration shows the names of the OTLP headers, never their values."""
    config = with_set(f"export.otlp.headers.api-key={SECRET}")
    assert config.export.otlp.headers == {"api-key": SECRET}
    shown = dump(config)
    assert SECRET not in shown
    assert yaml.safe_load(shown)["export"]["otlp"]["headers"] == {"api-key": "***"}


@pytest.mark.parametrize(
    "name",
    [
        *(
            "Authorization",
            "Proxy-Authorization",
            "cookie",
            "Set-Cookie",
            "x-api-key",
            "api-key",
            "apikey",
            "x_api_key",
        ),
        *("X-Auth-Token", "X-Amz-Security-Token", "x-goog-api-key", "Ocp-Apim-Subscription-Key", "x-csrf-token"),
    ],
)
def test_secret_headers_are_refused_without_the_dangerous_setting(name):
    """Headers with credentials cannot be captured by naming them; only the setting named for the danger allows it."""
    for key in ("request_headers", "response_headers"):
        error = error_of(with_set, f"capture.{key}=[x-ok, {name}]")
        assert error.startswith(f"capture.{key}: {name.lower()} may carry credentials and is refused")
        config = with_set(f"capture.{key}=[{name}]", "capture.dangerously_allow_secret_headers=true")
        assert value(config, f"capture.{key}") == (name.lower(),)


@pytest.mark.parametrize("name", ["content-type", "x-request-id", "x-tenant", "cache-control", "idempotency-key"])
def test_harmless_headers_are_not_refused(name):
    """Names that only look a little alike stay usable."""
    assert with_set(f"capture.request_headers=[{name}]").capture.request_headers == (name,)


# ---- Derived things ----------------------------------------------------------------------------------------------


def test_query_keys_default_is_that_of_the_redactor():
    """The documented default and the one that the redaction uses on its own are the same list."""
    assert Config().redaction.query_keys == DEFAULT_QUERY_KEYS


def test_dump_can_be_loaded_again(tmp_path):
    """What --print-config shows is a configuration file with the same meaning."""
    config = with_set(
        "export.console=off",
        'telemetry.listen="[::1]:0"',
        'routes.patterns=["GET /users/{id}", "/é/*"]',
        "resource.attributes={a: '1', b: 1, c: true, d: 1.5, e: '*', f: 'off'}",
        "select.executables.include=['*', '&x', '/usr/bin/*']",
        "export.otlp.endpoint=collector:4317",
    )
    assert with_file(tmp_path, dump(config)) == config


@pytest.mark.parametrize("listen", ["127.0.0.1:9469", "[::1]:0", "[fe80::1%eth0]:1", "localhost:65535", ":9469", None])
def test_listen_accepts(listen):
    """A listen address is a host (IPv6 in brackets, empty for all) and a port that the server takes too, or nothing."""
    assert with_set(f"telemetry.listen={json.dumps(listen)}").telemetry.listen == listen
    assert listen is None or parse_listen(listen)


@pytest.mark.parametrize("listen", ["", "host", "host:", "host:65536", "::1:1", "a b:1", "host:1\n", "host:٣"])
def test_listen_refuses(listen):
    """What is not clearly HOST:PORT is refused."""
    assert "must be HOST:PORT" in error_of(with_set, f"telemetry.listen={json.dumps(listen)}")


@pytest.mark.parametrize(
    ("endpoint", "kept"),
    [
        ("http://h:4317", "http://h:4317"),
        ("HTTPS://h/", "https://h"),
        ("h", "h"),
        ("h:1", "h:1"),
        ("[::1]:1", "[::1]:1"),
        ("http://[::1]", "http://[::1]"),
    ],
)
def test_endpoint_forms(endpoint, kept):
    """An endpoint is kept in a form that the exporter understands."""
    assert with_set(f"export.otlp.endpoint={json.dumps(endpoint)}").export.otlp.endpoint == kept
    assert parse_endpoint(kept, insecure=True)


def test_json_schema_covers_every_setting():
    """The schema for the Helm chart has every key with its description, refuses unknown ones, and takes a bare off."""
    schema = msgspec.json.decode(msgspec.json.encode(config_doc.json_schema()))
    definitions = schema["$defs"]
    for key, _ in leaves():
        node = definitions["Config"]
        for part in key.split("."):
            node = node["properties"][part]
            reference = node.get("$ref") or node.get("allOf", [{}])[0].get("$ref")
            node = definitions[reference.rpartition("/")[2]] if reference else node
        assert node["description"], key
    assert all(definition["additionalProperties"] is False for definition in definitions.values())
    assert False in definitions["Export"]["properties"]["console"]["enum"]


def test_every_setting_is_described_and_bounded():
    """Each setting has a text for the reference, and each number has both bounds."""
    for key, annotation in leaves():
        metas = annotation.__metadata__
        assert any(meta.description for meta in metas), key
        if annotation.__origin__ in (int, float):
            assert any(meta.ge is not None and meta.le is not None for meta in metas), key


def test_reference_page_is_up_to_date():
    """docs/configuration.md is what the generator makes; run: python -m agent.config_doc > docs/configuration.md."""
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == config_doc.reference()


def test_reference_page_names_every_key():
    """Each dotted key has a row in the reference."""
    page = config_doc.reference()
    for key, _ in leaves():
        assert f"\n| `{key}` | " in page


def test_configuration_is_frozen():
    """A configuration cannot be changed in place: stages may keep references to it."""
    with pytest.raises(AttributeError):
        Config().sampling.ratio = 0.5  # type: ignore[misc]


def test_pipe_as_file():
    """A pipe can be the configuration file, as in --config <(...)."""
    reader, writer = os.pipe()
    os.write(writer, b"sampling: {ratio: 0.5}\n")
    os.close(writer)
    try:
        assert load(Path(f"/dev/fd/{reader}"), [], {}).sampling.ratio == 0.5
    finally:
        os.close(reader)
