"""What an embedder may not ask for: one clear error, before anything listens."""
import pytest

import ironcage_proxy as ic


@pytest.mark.parametrize("port", [99999, -1, 2 ** 70])
def test_an_embedders_port_that_is_none_is_one_clear_error(port):
    with pytest.raises(ic.Misconfigured, match="cannot listen on 127.0.0.1 port"):
        ic.LlmRouter(port=port, environ={})


def test_an_embedders_setting_that_there_is_not_is_named():
    with pytest.raises(ic.Misconfigured, match="did you mean wait_s"):
        ic.LlmRouter(waits=3, environ={})


def test_an_embedded_routers_server_must_be_one_that_can_be_asked():
    for arguments in ({"server_url": "nonsense", "api_key": "ic_server-canary-0123456789"},
                      {"server_url": "https://cage.example"}):
        with pytest.raises(ic.Misconfigured, match="server_url"):
            ic.LlmRouter(environ={}, **arguments)
