"""``miepo rollout-server --config .. | --ckpt_path FOLDER``: the line that starts a vLLM server, or the server."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miepo.errors import UserError

MODULE = "vllm.entrypoints.openai.api_server"


def make_parser() -> ArgumentParser:
    """Make the parser of the command's own options."""
    parser = ArgumentParser(
        prog="miepo rollout-server",
        description="Prints the line that starts a vLLM server for the rollouts of a run, or for a trained policy "
        "under any preference; with --run it is run. A run's options are those of fit: --config online.yaml, and "
        "changes to it. What follows -- goes to vLLM as it is.",
    )
    parser.add_argument("--ckpt_path", type=Path, help="serve a folder of miepo export in place of a run's rollouts")
    parser.add_argument("--name", default="miepo", help="of that policy: a request names NAME@objective=0.2,other=0.8")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--adapters", type=int, help="adapters that are computed with at one time")
    parser.add_argument("--python", default="python", help="the interpreter of an environment with vLLM and miepo")
    parser.add_argument("--run", action="store_true", help="start the server in place of printing the line")
    return parser


def main(args: Sequence[str]) -> None:
    """Print the line of a server, or become it."""
    own = list(args)
    further = own[own.index("--") + 1 :] if "--" in own else []
    options, rest = make_parser().parse_known_args(own[: own.index("--")] if "--" in own else own)
    if not 0 < options.port < 2**16:
        raise UserError(f"--port: expected a number from 1 to 65535, got {options.port}")
    if options.adapters is not None and options.adapters < 1:
        raise UserError(f"--adapters must be at least 1, got {options.adapters}")
    if options.ckpt_path is not None and rest:
        raise UserError(f"expected --ckpt_path or a configuration, got both ({' '.join(rest)})")
    settings = settings_of_policy(options) if options.ckpt_path else settings_of_run(options, rest)
    environment, line = command_line(options, settings, further)
    if not options.run:
        print(shlex.join([*(f"{name}={value}" for name, value in environment.items()), *line]))
        return
    try:
        os.execvpe(line[0], line, os.environ | environment)
    except OSError as error:
        raise UserError(f"--python: expected an interpreter with vLLM, got '{options.python}' ({error})") from None


def cuda() -> bool:
    """Return whether this machine has a GPU, as the server's is taken to have."""
    import torch

    return torch.cuda.is_available()


def settings_of_run(options: Namespace, args: Sequence[str]) -> dict[str, Any]:
    """Return what vLLM is told for the rollouts of a run, by option."""
    if not args:
        raise UserError("expected --config of a run, or --ckpt_path of a trained policy, got neither")
    from miepo.cli.trainer import run_cli

    cli: Any = run_cli(run=False, save_config_callback=None, args=list(args))
    return settings_for(cli.trainer, cli.model, cli.datamodule, options.adapters)


def settings_for(trainer: Any, module: Any, data: Any, adapters: int | None) -> dict[str, Any]:
    """Return what vLLM is told for the rollouts of what a configuration builds, by option."""
    from miepo.objectives.base import objectives_of
    from miepo.policy.base_model import base_folder
    from miepo.policy.precision import chosen_dtype

    policy, count = module.policy, len(objectives_of(trainer))
    blocks = sum(conditioning.blocks(count) for conditioning in policy.conditioning)
    return {
        "model": base_folder(policy.base),
        "dtype": chosen_dtype(policy.dtype, trainer.strategy.root_device),
        "max-lora-rank": policy.lora_rank * max(blocks, 1),
        "max-loras": adapters or getattr(data, "staleness", 0) + 2,  # as it is, and states that requests still name
    }


def settings_of_policy(options: Namespace) -> dict[str, Any]:
    """Return what vLLM is told for a trained policy, by option."""
    from miepo.policy.base_model import base_folder
    from miepo.vllm.request import Card

    folder = options.ckpt_path.absolute()
    card = Card(folder)
    settings = {
        "model": base_folder(card.base),
        "dtype": "auto",
        "max-lora-rank": max(end for _, end in card.columns) if card.columns else card.rank,
        "max-loras": options.adapters or 1,
        "lora-modules": f"{options.name}={folder}",
    }
    template = folder / "chat_template.jinja"
    return settings | ({"chat-template": str(template)} if template.is_file() else {})


def command_line(
    options: Namespace, settings: dict[str, Any], further: Sequence[str], gpu: bool | None = None
) -> tuple[dict[str, str], list[str]]:
    """Return the environment and the words that start a server.

    Args:
        options: The command's own.
        settings: For the rollouts of a run or a trained policy.
        further: Words for vLLM.
        gpu: Whether it has a GPU; by default as this machine has.

    Raises:
        UserError: the adapter has a rank that vLLM has no room for.
    """
    from miepo.rollout.vllm_engine import room_for

    words = {**settings, "max-lora-rank": room_for(settings["max-lora-rank"])}
    words |= {"max-cpu-loras": 2 * settings["max-loras"]}
    words |= {"generation-config": "vllm", "logprobs-mode": "processed_logprobs"}  # nothing truncated or penalised
    words |= {"host": options.host, "port": options.port}
    environment = {
        "VLLM_PLUGINS": "miepo",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        **({} if options.ckpt_path else {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}),
    }
    python = sys.executable if options.run and options.python == "python" else options.python
    # with it, vLLM 0.32 on a CPU ends at a request with a seed whose prompt is read in two parts
    chunks = [] if (cuda() if gpu is None else gpu) else ["--no-enable-chunked-prefill"]
    flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    return environment, [python, "-m", MODULE, "--enable-lora", *chunks, *flags, *further]
