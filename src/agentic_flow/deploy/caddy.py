"""The proxy's configuration: TLS outside, TLS inside, and requests held while a service is replaced.

What it holds it has not begun to send: before 2.11.4 Caddy lost a request's body with a connection that
could not be made, so that a POST could not be repeated after one. Therefore it looks twice a second whether a
service takes requests, and a service that is to stop says so before it does (`serve.linger_s`).

What it has sent it never asks for again: docs/decisions/0034 tells why there is a bound on bodies that bounds
none.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentic_flow.deploy.parts import Published, certificate_files

ADMIN = "unix//tmp/caddy.sock"
"""Where Caddy is told to take up renewed certificates: within its container alone."""
HOLD_S = 30
"""Longest time that a request waits for a service that takes none."""
_GRACE_S = 10
# Less than `serve.linger_s` of the services: one that goes closes what was idle for so long.
_IDLE_S = 2
# Longer than it takes to find a name on a machine that has no time: a request is lost with its connection.
_DIAL_S = 10
_LOOK_MS = 500
# No body is as large; services have a limit of their own. A body that is counted knows that it has ended. Any
# other is asked once more after its last byte was sent; if its answer has begun by then, that is cut.
_BODY_MAX = "1EB"
# Nothing was sent as long as nobody was there to send it to: then any request may be tried again, and its
# body is whole. Once it was sent, only what reads may.
_HELD = "`{http.reverse_proxy.upstream.hostport} == null`"
# Whether a service of ours is about to go, or not there yet, is seen before a connection to it fails.
_LOOKS = f"""		health_uri /health/accepting
		health_interval {_LOOK_MS}ms
		health_timeout 2s
"""


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
	admin {ADMIN}
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
	request_body {{
		max_size {_BODY_MAX}
	}}
	reverse_proxy {scheme}://{one.part}:{one.inner_port} {{
		lb_try_duration {HOLD_S}s
		lb_try_interval 100ms
		lb_retry_match {{
			method GET HEAD
		}}
		lb_retry_match {{
			expression {_HELD}
		}}
{_LOOKS if one.tls else ""}		flush_interval -1
		transport http {{
			versions 1.1
			dial_timeout {_DIAL_S}s
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
