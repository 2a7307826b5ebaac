"""Serves a reward over HTTP: `python -m rewards.serve NAME`. docs/remote_rewards.md has the protocol."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from cluster import signals
from commands.outcome import complain
from commands.score import option
from learner import hidden
from rewards import package_environment, registry, tokens
from rewards.own_code import named_failure

if TYPE_CHECKING:
    import numpy as np

    from rewards.serving import Served

PROGRAM = "rewards.serve"
BATCH, MIB = 16, 2**20


def enter(command: Callable[[], int]) -> NoReturn:
    """Run it and leave the process with its exit status."""
    if faults := hidden():
        print(*(f"{PROGRAM}: {fault}" for fault in faults), sep="\n", file=sys.stderr)
        sys.exit(2)
    signals.watch(PROGRAM)
    signals.leave_with(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until a signal: 130 and 143 as learner.run. 2, after one line on stderr: bad input."""
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=__doc__)
    add = parser.add_argument
    add("name", metavar="NAME", help=f"{', '.join(registry.NAMES)}, or your own as module:callable")
    add("--weights", help="path or hub id")
    add("--option", action="append", default=[], metavar="KEY=VALUE", help="of the reward; JSON or text")
    add("--device", default="cpu", help="cpu or cuda")
    add("--package", action="store_true", help="of imagereward and hpsv2: their authors' code, in its own environment")
    add("--host", default="127.0.0.1", help="address to listen on; others than this machine's own need a token")
    add("--port", type=int, default=8100, help="0: any that is free")
    add("--batch", type=int, default=BATCH, metavar="N", help=f"pictures in one call, at most (default {BATCH})")
    add(
        "--body", type=int, default=64, metavar="MIB", help="a request at most (default 64); its pictures four times it"
    )
    add("--separate", action="store_true", help="score no two requests together: repeatable in the last bits")
    add(
        "--token-env",
        default=tokens.VARIABLE,
        metavar="NAME",
        help=f"variable that holds the token (default {tokens.VARIABLE})",
    )
    add("--token-file", metavar="FILE", help="that holds the token")
    args = parser.parse_args(arguments)
    try:
        for flag in ("batch", "body"):
            if vars(args)[flag] < 1:
                raise ValueError(f"--{flag}: {vars(args)[flag]}, expected 1 or more")
        options = dict(option(text) for text in args.option)
        registry.check_options(options)
        registry.check_name(args.name)
        token = tokens.read(args.token_env, args.token_file, "--token-")
        with listen(args.host, args.port, token) as listener:
            if args.package:
                start_package(args, options, token, listener)
            registry.check(args.name, args.weights, options, [])
            from rewards.serving import Limits, Service

            def load() -> Served:
                return served(registry.load(args.name, args.weights, args.device, **options), args.device, args.batch)

            signals.enter("running")
            limits = Limits(body=args.body * MIB)
            Service(args.name, load, token, merge=not args.separate, limits=limits).run(listener)
    except KeyboardInterrupt:
        return signals.status()
    except (ValueError, OSError, RuntimeError, AssertionError) as error:  # the last two: a device that is not here
        complain("serve", str(error), "rewards")
        return 2
    return 0


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """A socket of that address. Raises ValueError where others reach it and there is no `token`, or it is not to be
    had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        if token is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            raise ValueError(
                f"--host: others reach {host}: give a token, by --token-file or the variable {tokens.VARIABLE}"
            )
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ValueError(f"--host, --port: cannot listen on {host}, port {port}: {error}") from error
    except ValueError:
        listener.close()
        raise
    return listener


def served(reward: registry.Reward, device: str, batch: int) -> Served:
    """A reward of ours or a user's own, for the server: pictures become images in [0, 1]."""
    import numpy as np
    import torch

    from rewards import contract
    from rewards.serving import Refused, Served

    def score(pictures: list[np.ndarray], prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        failed = f"reward {reward.name} failed on {len(prompts)} images, the first with prompt {prompts[0]!r:.200}"
        images = (torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255).contiguous()
        with torch.no_grad(), named_failure(Refused, failed):
            return contract.call(reward, images.to(device), prompts, metadata).tolist()

    limits = contract.told(reward, "range")
    most = contract.told(reward, "batch") or batch
    takes = contract.takes_metadata(getattr(reward, "function", reward))  # a user's own
    return Served(score, takes, limits and tuple(limits), min(batch, most))


def start_package(
    args: argparse.Namespace, options: dict[str, Any], token: str | None, listener: socket.socket
) -> None:
    """This process becomes the package's own interpreter, on rewards/package_worker.py. Raises ValueError,
    EnvironmentMissing, WeightsNotFound."""
    from rewards import package_worker
    from rewards.weights import find

    if args.name not in package_environment.NAMES:
        raise ValueError(f"--package: {args.name} has none; there are {', '.join(package_environment.NAMES)}")
    python = package_environment.find(args.name)
    assets = registry.assets(args.name, args.weights, options)
    if args.name == "hpsv2":
        assets = assets[:1]  # the package brings its tokenizer
    roles = [asset.key.rpartition(".")[2] for asset in assets]  # weights, med_config, tokenizer
    files = {role: str(path.absolute()) for role, path in zip(roles, find(assets), strict=True)}
    settings = {
        "name": args.name,
        "files": files,
        "device": args.device,
        "batch": args.batch,
        "merge": not args.separate,
        "body": args.body * MIB,
    }
    listener.set_inheritable(True)
    # -I: neither PYTHONPATH nor this folder, whose modules have names that the packages' own may have. Nothing of ours
    # may be looked up on a hub in there: it is handed local files.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    environment.pop(args.token_env, None)
    if token:
        environment[tokens.VARIABLE] = token
    command = [str(python), "-I", package_worker.__file__, json.dumps(settings), str(listener.fileno())]
    os.execve(python, command, environment)
