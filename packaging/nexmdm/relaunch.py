"""Relaunch a crashed Unity app through NexMDM. This program receives nexhb's webhooks on loopback, and asks NexMDM to
restart the app on the devices of the incident. It replaces NexMDM's auto-relaunch, which depends on heartbeats.

Run it with nexhb's own Python, which has the libraries: `/opt/nexhb/bin/python packaging/nexmdm/relaunch.py`. All
settings are environment variables; docs/moving.md shows them, and the route for nexhb's configuration.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import aiohttp
from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError

RELAUNCHED = ("incident.opened", "incident.widened", "incident.reminder")
PAGE = 500  # devices in a request
MAX_DEVICES = 10_000
TIMEOUT_S = 12.0  # shorter than the 15 s after which nexhb gives up the attempt
_log = logging.getLogger("relaunch")


class Relauncher:
    """Handle webhooks. An error makes the response a 502, so that nexhb sends the message again."""

    def __init__(self, env: dict[str, str]) -> None:
        self._webhook = Webhook(env["ROUTE_SECRET"])
        self._nexhb, self._admin = env.get("NEXHB_URL", "http://127.0.0.1:8080"), {"X-Admin": env["NEXHB_ADMIN_KEY"]}
        self._nexmdm = env["NEXMDM_URL"]
        self._user = {"username": env["NEXMDM_USER"], "password": env["NEXMDM_PASSWORD"]}
        self._package = {"package_name": env["NEXMDM_PACKAGE"]} if env.get("NEXMDM_PACKAGE") else {}

    async def handle(self, request: web.Request) -> web.Response:
        """Relaunch the app on the devices of an incident of the kind `unity_down`; accept every other message."""
        try:
            message = self._webhook.verify(await request.text(), dict(request.headers))
        except WebhookVerificationError:
            return web.Response(status=401, text="The signature is wrong.")
        data = message["data"]
        if message["type"] not in RELAUNCHED or data.get("kind") != "unity_down":
            return web.Response(status=204)
        try:
            timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
            async with aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as http:
                if devices := await self._devices(http, data):
                    await self._restart(http, devices)
        except (aiohttp.ClientError, TimeoutError, KeyError) as error:
            _log.exception("NexMDM or nexhb did not answer as expected")
            return web.Response(status=502, text=type(error).__name__)
        _log.info("incident %s: %d devices", data["incident_id"], len(devices))
        return web.Response(status=204)

    async def _devices(self, http: aiohttp.ClientSession, data: dict[str, Any]) -> list[str]:
        """Return the devices of the incident whose Unity is down now."""
        found: list[str] = []
        query = {"limit": str(PAGE)} | ({"site": data["site"]} if data.get("site") else {})
        while len(found) < MAX_DEVICES:
            async with http.get(f"{self._nexhb}/v1/devices/unity-down", params=query, headers=self._admin) as response:
                page = await response.json()
            found += [each["device_id"] for each in page["devices"] if each["incident_id"] == data["incident_id"]]
            if page["next"] is None:
                break
            query["after"] = page["next"]
        return found

    async def _restart(self, http: aiohttp.ClientSession, devices: list[str]) -> None:
        async with http.post(f"{self._nexmdm}/api/auth/login", json=self._user) as response:
            token = (await response.json())["access_token"]
        body = {"scope_type": "device_ids", "device_ids": devices, **self._package}
        headers = {"Authorization": f"Bearer {token}"}
        async with http.post(f"{self._nexmdm}/v1/remote-exec/restart-app", json=body, headers=headers):
            pass


def application(env: dict[str, str]) -> web.Application:
    """Return the application, with the settings of `env`."""
    app = web.Application(client_max_size=256 * 1024)
    app.router.add_post("/relaunch", Relauncher(env).handle)
    return app


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    web.run_app(application(dict(os.environ)), host="127.0.0.1", port=int(os.environ.get("PORT", "8091")))
