"""``miepo normalise``: measures the normalisation of rewards on offline data."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from miepo.errors import UserError
from miepo.resources import check_writable


def make_parser() -> ArgumentParser:
    """Make the parser of the command's own options."""
    parser = ArgumentParser(
        prog="miepo normalise",
        description="Measures mean and standard deviation of every objective on offline data. All other options are "
        "those of a run: --config online.yaml, and changes to it.",
    )
    parser.add_argument("--out", type=Path, help="the file to write; data.normalisation of a run takes it")
    return parser


def main(args: Sequence[str]) -> None:
    """Run ``miepo normalise --config .. --out FILE``: measure the normalisation on offline data, and write it."""
    options, rest = make_parser().parse_known_args(args)
    if options.out is None:
        raise UserError("normalise writes a file: expected --out, got none")
    if options.out.exists():
        raise UserError(f"expected a new file for the normalisation, got '{options.out}', which exists")
    check_writable(options.out)
    from miepo.cli.trainer import run_cli
    from miepo.data.module import OnlinePreferenceDataModule
    from miepo.objectives.base import objectives_of
    from miepo.objectives.normalisation import calibrate, write_normalisation

    cli = run_cli(run=False, save_config_callback=None, args=rest)
    objectives = objectives_of(cli.trainer)
    if not isinstance(cli.datamodule, OnlinePreferenceDataModule):
        raise UserError(f"normalise needs data OnlinePreferenceDataModule, got {type(cli.datamodule).__name__}")
    offline = cli.datamodule.offline_responses()
    if offline is None:
        raise UserError("normalise measures on offline data: expected data.normalise_on offline or a file")
    missing = [o for o in objectives if o.normalisation is None]
    if not missing:
        raise UserError("normalise measures what has no normalisation in the config: every objective has one")
    for objective in missing:
        objective.load_checked(cli.trainer.strategy.root_device)
        calibrate([objective], offline)
        objective.unload()  # one model at a time
        assert objective.normalisation is not None
        print(f"{objective.name}: mean {objective.normalisation.mean:.4g}, sd {objective.normalisation.sd:.4g}")
    write_normalisation(options.out, missing, offline)
    print(f"Normalisation on {len(offline.responses)} responses of {offline.source}: {options.out}")
