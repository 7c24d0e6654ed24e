"""Waiting for one of two things."""

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

Result = TypeVar("Result")


async def first(
    work: Coroutine[None, None, Result], end: Coroutine[None, None, None]
) -> Result | None:
    """Return the result of `work`, or None if `end` comes first; the other one is cancelled."""
    working, ending = asyncio.create_task(work), asyncio.create_task(end)
    try:
        await asyncio.wait((working, ending), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        ending.result()  # raises what it has raised
        return None
    finally:
        working.cancel()
        ending.cancel()
        await asyncio.gather(working, ending, return_exceptions=True)
