"""`tally audit calibrate`: thresholds of audits from two honest engines."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from tallystick.cli.options import Json
from tallystick.cli.output import show_fields, show_json, step
from tallystick.cli.progress import activity
from tallystick.protocol.errors import BadMessage


def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model's name on the market.")],
    engines: Annotated[
        list[str],
        typer.Option(
            "--engine",
            help="Base URL of an engine that serves the model as it should; twice, best on machines of different kinds.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--out", "-o", help="File for the thresholds, beside what it has: that of `[audits] thresholds`.")
    ],
    precision: Annotated[str, typer.Option("--class", help="Class that both engines serve; empty for all.")] = "",
    served_model: Annotated[str, typer.Option("--served-model", help="The engines' own name of the model, if another one.")] = "",
    api_key_env: Annotated[
        str | None, typer.Option("--api-key-env", help="Environment variable with the key of both engines, if they want one.")
    ] = None,
    answers: Annotated[int, typer.Option("--answers", min=50, max=10_000, help="Answers of each engine, per test.")] = 60,
    as_json: Json = False,
) -> None:
    """Find out how far apart honest engines are, and write thresholds of audits with a margin above that.

    Both engines write answers, and score their own and each other's. Use engines that differ as honest providers do: another
    machine, another version. The thresholds are 1.5 times what 99.9 % of the answers stay below.
    """
    import os
    from contextlib import AsyncExitStack

    from tallystick.client.audits.calibration import HonestEngine, HonestPairs, compare, write_thresholds
    from tallystick.scoring.engine_api import EngineApi

    if len(engines) != 2:
        raise BadMessage(f"--engine: expected two engines, got {len(engines)}")
    key = None if api_key_env is None else os.environ.get(api_key_env, "").strip()
    if api_key_env is not None and not key:
        raise BadMessage(f"--api-key-env: expected the environment variable {api_key_env} to be set")

    async def run() -> HonestPairs:
        async with AsyncExitStack() as stack:
            apis = [await stack.enter_async_context(EngineApi.open(url, key)) for url in engines]
            name = served_model or model
            honest = [await HonestEngine.of(api, name, f"--engine {url}") for api, url in zip(apis, engines, strict=True)]
            with activity("comparing answers", 2 * answers) as shown:
                return await compare(honest, answers, lambda done: shown.update(done=done))

    pairs = asyncio.run(run())
    try:
        thresholds = pairs.thresholds()
    except ValueError as error:
        raise BadMessage(f"--answers: {error}: many answers were too short; ask for more") from None
    write_thresholds(output, model, precision, thresholds)
    figures = {
        "divergence": thresholds.divergence,
        "largestDivergence": max(pairs.divergence),
        "margin": thresholds.margin,
        "largestMargin": max(pairs.margin),
        "answers": len(pairs.divergence),
    }
    if as_json:
        show_json(figures)
        return
    show_fields((name, f"{value:.5f}" if isinstance(value, float) else str(value)) for name, value in figures.items())
    step(f"{output} has the thresholds of {model}{f' in {precision}' if precision else ''}; name it in [audits] thresholds")
