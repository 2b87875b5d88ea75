"""What the ends of a TLS connection agreed on, as attributes."""

from __future__ import annotations

import re
import subprocess

import pytest
from opentelemetry.semconv._incubating.attributes import tls_attributes as names

from agent.protocols import tls
from tests.unit.test_http1 import GET, exchange, parser


def test_names_are_those_of_the_conventions():
    keys = {key for key, _ in tls.attributes_of(0x03041301)}
    assert keys == {names.TLS_PROTOCOL_NAME, names.TLS_PROTOCOL_VERSION, names.TLS_CIPHER}


@pytest.mark.parametrize(
    ("agreed", "attributes"),
    [
        (0x0304_1302, ("tls", "1.3", "TLS_AES_256_GCM_SHA384")),
        (0x0303_C02F, ("tls", "1.2", "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256")),
        (0x0301_002F, ("tls", "1.0", "TLS_RSA_WITH_AES_128_CBC_SHA")),
        (0x0300_0035, ("ssl", "3", "TLS_RSA_WITH_AES_256_CBC_SHA")),
        (0x0303_FAFA, ("tls", "1.2")),
        (0x0399_1301, ("TLS_AES_128_GCM_SHA256",)),
        (0, ()),
    ],
)
def test_what_is_unknown_is_left_out(agreed, attributes):
    assert tuple(value for _, value in tls.attributes_of(agreed)) == attributes


def test_suites_have_the_names_that_openssl_knows():
    """Its standard names are IANA's."""
    command = ["openssl", "ciphers", "-V", "-stdname", "ALL:COMPLEMENTOFALL:@SECLEVEL=0"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    known = {
        int(first, 16) << 8 | int(second, 16): name
        for first, second, name in re.findall(r"0x(..),0x(..) - (\S+)", listed)
    }
    assert len(known) > 30
    shared = known.keys() & tls.CIPHER_SUITES.keys()
    assert len(shared) > 30
    assert {number: known[number] for number in shared} == {number: tls.CIPHER_SUITES[number] for number in shared}


def test_an_exchange_says_it_each_time():
    """By the long way, and when it repeats by the short one; what is not TLS has none of it."""
    http1 = parser()
    for agreed in (0x0304_1301, 0x0304_1301, 0x0303_C030, 0):
        found = dict(http1.parse(exchange(GET, tls=agreed)).all_attributes())
        assert {key: value for key, value in found.items() if key.startswith("tls.")} == dict(tls.attributes_of(agreed))
