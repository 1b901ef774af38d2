"""What batches ahead bring: ``python -m tools.overlap --python PYTHON_WITH_VLLM``.

The quickstart's model and objectives, with one vLLM server on a core of its own and the training on another: seconds of
a step with ``data.staleness`` 0, 1 and 2, in turn, and how far the engine's log-probabilities are from the policy's.
"""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import yaml

CONFIG = "configs/quickstart.yaml"
LOGGER = "lightning.pytorch.loggers.CSVLogger"


def pinned(words: Sequence[str], core: int, log: Path, **environment: str) -> subprocess.Popen:
    """Start a command on one core, with one thread."""
    own = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | environment
    with log.open("a") as file:
        return subprocess.Popen(
            words, env=os.environ | own, stdout=file, stderr=file, preexec_fn=lambda: os.sched_setaffinity(0, {core})
        )


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="of an environment with vLLM and miepo")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--port", type=int, default=8400)
    options = parser.parse_args()
    url = f"http://127.0.0.1:{options.port}"
    miepo = [sys.executable, "-m", "miepo"]
    run = ["--config", CONFIG, "--data.batch_size", str(options.prompts), "--data.max_new_tokens", str(options.tokens)]
    run += ["--model.policy.init_args.dtype", "float32", "--data.normalise_on", "8", "--trainer.limit_val_batches", "0"]
    run += ["--trainer.num_sanity_val_steps", "0", "--trainer.max_steps", str(options.steps)]
    run += ["--trainer.log_every_n_steps", "1", "--data.engine", "miepo.rollout.ServerEngine"]
    run += ["--data.engine.urls", f'["{url}"]', "--data.engine.patience", "600"]
    with tempfile.TemporaryDirectory() as folder:
        serve = [*miepo, "rollout-server", *run, "--data.staleness", "2", "--port", str(options.port), "--run"]
        serve += ["--python", options.python, "--", "--enforce-eager", "--max-model-len", "512"]
        server = pinned(serve, 0, Path(folder) / "server.log", VLLM_CPU_KVCACHE_SPACE="1")
        try:
            found: dict[int, list[dict[str, float]]] = {staleness: [] for staleness in options.staleness}
            for number in range(options.rounds):
                for staleness in options.staleness:
                    root = Path(folder) / f"{number}_{staleness}"
                    root.mkdir()
                    logger = {"class_path": LOGGER, "init_args": {"save_dir": str(root), "name": "run"}}
                    place = {"trainer": {"default_root_dir": str(root), "logger": [logger]}}
                    (root / "place.yaml").write_text(yaml.safe_dump(place))
                    words = [*miepo, "fit", *run, "--config", str(root / "place.yaml")]
                    words += ["--data.staleness", str(staleness)]
                    log = Path(folder) / f"{number}_{staleness}.log"
                    if pinned(words, 1, log).wait():
                        raise SystemExit(log.read_text()[-3000:])
                    (metrics,) = root.rglob("metrics.csv")
                    rows = [row for row in csv.DictReader(metrics.open()) if row.get("time/step")]
                    found[staleness] += [
                        {k: float(v) for k, v in row.items() if v and k != "epoch"}
                        for row in rows[options.steps // 2 :]
                    ]
        finally:
            server.terminate()
            server.wait(60)
    print(f"{options.prompts} prompts, 2 x {options.tokens} tokens, float32, medians over the later half of each run")
    print("| staleness | s a step | of it waiting for responses | ratio | gap, nats a token |")
    print("|---|---|---|---|---|")
    first = None
    for staleness, rows in found.items():
        step, waiting, gap = (
            statistics.median(row[key] for row in rows) for key in ("time/step", "time/sampling", "rollout/gap")
        )
        first = first or step
        print(f"| {staleness} | {step:.2f} | {waiting:.2f} | {step / first:.2f} | {gap:.1e} |")


if __name__ == "__main__":
    main()
