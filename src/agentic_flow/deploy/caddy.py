"""The proxy's configuration: TLS outside, TLS inside, and requests held while a service is replaced."""

from __future__ import annotations

from collections.abc import Sequence

from agentic_flow.deploy.parts import Published, certificate_files

HOLD_S = 30
"""Longest time that a request waits for a service that takes no connections."""
_GRACE_S = 10
# Ours close an idle connection after 75 s; one that is reused must not be just closing.
_IDLE_S = 60


def caddyfile(published: Sequence[Published], head: str) -> str:
    """The Caddyfile of a stack.

    `tls_trusted_ca_certs` is the name that Caddy 2.6 (Debian 13) and newer both know.

    Args:
        published: Ports of the proxy and who is behind them.
        head: Comment lines for its beginning.
    """
    _, certificate, key = certificate_files("proxy")
    sites = "\n".join(_site(one, certificate, key) for one in published)
    return f"""{head}
{{
	admin off
	auto_https off
	grace_period {_GRACE_S}s
	log {{
		output stderr
		format json
		level WARN
	}}
	servers {{
		protocols h1 h2
	}}
}}

{sites}"""


def _site(one: Published, certificate: str, key: str) -> str:
    scheme = "https" if one.tls else "http"
    return f""":{one.port} {{
	tls {certificate} {key}
	reverse_proxy {scheme}://{one.part}:{one.inner_port} {{
		lb_try_duration {HOLD_S}s
		lb_try_interval 250ms
		flush_interval -1
		transport http {{
			versions 1.1
			dial_timeout 2s
			keepalive {_IDLE_S}s
{_inner_tls(one) if one.tls else ""}		}}
	}}
}}
"""


def _inner_tls(one: Published) -> str:
    ca, certificate, key = certificate_files("proxy")
    return f"""			tls_trusted_ca_certs {ca}
			tls_client_auth {certificate} {key}
			tls_server_name {one.part}
"""
