"""One worker process of the budget tests: many calls at once, of random costs.

    python gateway_budgets_worker.py DATABASE CALLS SEED MODE

DATABASE is a PostgreSQL URL or a SQLite file. It prints `ready`, waits for a line on its input, and then
prints `reserve NANO` the moment a call is let through (before it could reach a provider), `settle COST MOST`
before it tells the budgets the cost, `refused`, `unavailable`, and `done`. MODE `spend` goes on until the
budget refuses; `hold` never settles.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from pathlib import Path

import structlog

from agentic_flow.core.errors import BudgetExceeded, Unavailable
from agentic_flow.core.sql import SqlDatabase
from agentic_flow.gateway.budgets.service import TABLES, Budgets
from agentic_flow.gateway.policies import BudgetRule, Caller

LIMIT_USD = 20.0
RULES = (
    BudgetRule(scope="platform", limit_usd=LIMIT_USD, period="total"),
    BudgetRule(scope="tenant", limit_usd=LIMIT_USD * 10, period="total"),
    BudgetRule(scope="key", limit_usd=LIMIT_USD * 10, period="total"),
    BudgetRule(scope="agent", limit_usd=LIMIT_USD * 10, period="total"),
)


def database(where: str) -> SqlDatabase:
    """The gateway's database as these tests open it."""
    url = where if "://" in where else None
    return SqlDatabase(
        url, Path(where), name="gateway database", setting="gateway.database_url", create=TABLES
    )


def say(*words: object) -> None:
    # One write a line: what a killed process had said is whole.
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def call(budgets: Budgets, number: int, seed: int, mode: str) -> None:
    """Calls one after the other until the budget says no."""
    dice = random.Random(f"{seed} {number}")
    caller = Caller("acme", f"key{number % 5}", f"agent{number % 3}")
    while True:
        most = dice.randint(1_000_000, 20_000_000)
        try:
            reservation = await budgets.reserve(caller, RULES, most)
        except BudgetExceeded:
            say("refused")
            return
        except Unavailable as error:
            say("unavailable", error)
            return
        say("reserve", most)
        if mode == "hold":
            return
        await asyncio.sleep(dice.random() * 0.1)
        cost = dice.randint(most // 4, most)
        say("settle", cost, most)
        reservation.settle(cost)


async def main(where: str, calls: int, seed: int, mode: str) -> None:
    """Open the budgets, wait for the word, and let all calls go at once."""
    store = database(where)
    budgets = Budgets(store)
    await budgets.start()
    say("ready", budgets.worker_id)
    await asyncio.to_thread(sys.stdin.readline)
    async with asyncio.TaskGroup() as group:
        for number in range(calls):
            group.create_task(call(budgets, number, seed, mode))
    if mode != "hold":
        await budgets.close()
    say("done")
    await asyncio.to_thread(sys.stdin.readline)
    store.close()


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
